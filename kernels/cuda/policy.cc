#include "kernels/cuda/policy.h"

#include <algorithm>
#include <bit>

#include "base/checked.h"

namespace longspan::cuda {
namespace {

constexpr int64_t kBlocksPerSm = 4;
constexpr int64_t kMinTokensPerSplit = 1024;
constexpr int kMinTileRows = 64;
constexpr int64_t kMinCandidatesPerSplit = 512;
constexpr int64_t kMaxSplits = 1024;
// A queue's keys: what 16 KB of shared memory hold, and what the queues of all blocks may take of
// device memory together.
constexpr int64_t kMaxSharedKeys = 2048;
constexpr int64_t kMaxKeysOfAllBlocks = int64_t{1} << 25;

// Pieces for each of `num_items`, so that the device is full and no piece is small.
int splits_of(int64_t num_items, int64_t length, int64_t min_length, const DeviceInfo& device) {
  if (num_items == 0) {
    return 1;
  }
  const int64_t wanted = divide_up(kBlocksPerSm * device.num_sms, num_items);
  return static_cast<int>(
      std::clamp<int64_t>(std::min(wanted, length / min_length), 1, kMaxSplits));
}

}  // namespace

int attend_splits(int64_t num_rows, int64_t num_tokens, const DeviceInfo& device) {
  return splits_of(num_rows, num_tokens, kMinTokensPerSplit, device);
}

bool prefers_decode(int64_t num_rows, int group) { return num_rows * group <= kMinTileRows; }

int section_heads(int num_kv_heads, int64_t bytes_per_head, const DeviceInfo& device) {
  const auto room = static_cast<int64_t>(device.l2_bytes) * 2 / 3;
  const int64_t fitting =
      std::clamp<int64_t>(room / std::max<int64_t>(bytes_per_head, 1), 1, num_kv_heads);
  return static_cast<int>(divide_up(num_kv_heads, divide_up(num_kv_heads, fitting)));
}

int attend_tile_rows(const TileShape& shape, int64_t alike_rows) {
  constexpr int kLarge = 2 * kMinTileRows;
  constexpr int kLargest = 3 * kMinTileRows;
  constexpr int kMaxListsOfLargest = 64;
  // Short heads: more rows to hide the exponentials behind. Otherwise their registers are needed.
  const bool has_largest = shape.key_dim <= 64 && shape.value_dim <= 64 &&
                           kLargest / shape.group * shape.lists_per_token <= kMaxListsOfLargest;
  if (has_largest && alike_rows >= kLargest) {
    return kLargest;
  }
  return alike_rows >= kLarge ? kLarge : kMinTileRows;
}

SearchGrid search_grid(int64_t num_lists,
                       int64_t num_entries,
                       int64_t max_k,
                       const DeviceInfo& device) {
  SearchGrid grid;
  grid.num_splits = splits_of(num_lists, num_entries, kMinCandidatesPerSplit, device);
  const auto capacity = static_cast<uint64_t>(std::max<int64_t>(2 * max_k, 2 * kSearchThreads));
  grid.queue_capacity = static_cast<int64_t>(std::bit_ceil(capacity));
  grid.shared_queue = grid.queue_capacity <= kMaxSharedKeys;
  const int64_t resident = kBlocksPerSm * std::max(device.num_sms, 1);
  const int64_t fitting =
      grid.shared_queue
          ? resident
          : std::clamp<int64_t>(kMaxKeysOfAllBlocks / grid.queue_capacity, 1, resident);
  grid.num_blocks = std::min(num_lists * grid.num_splits, fitting);
  return grid;
}

}  // namespace longspan::cuda
