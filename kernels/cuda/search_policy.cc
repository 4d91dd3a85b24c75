#include "kernels/cuda/search_policy.h"

#include <algorithm>

#include "base/checked.h"

namespace longspan::cuda {
namespace {

constexpr int64_t kPlacesPerRegister = 32;
constexpr int kMaxDecodeRegisters = 8;   // lists of 256 candidates
constexpr int kMaxPrefillRegisters = 4;  // lists of 128
// Entries and rows are 32-bit numbers in the kernels; sums of them with a round do not overflow.
constexpr int64_t kMaxIndex = int64_t{1} << 30;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGroups = 65535;  // blocks in the second dimension of a grid
// Decode: by which the shares are rounded, so that a warp's tile lies in one page.
constexpr int64_t kShareUnit = 32;
// Decode: below this a share of the entries is not worth a block of its own.
constexpr int64_t kMinShareEntries = 128;
// Decode: what the vectors of a block may take of shared memory.
constexpr int64_t kMaxVectorBytes = 64 * 1024;

// List lengths that the kernels are compiled for: 32, 64, 128 and 256.
int list_registers(int64_t max_k) {
  int registers = 1;
  while (registers * kPlacesPerRegister < max_k) {
    registers *= 2;
  }
  return registers;
}

// Of the vectors of a block, padded to whole passes over a tile.
int64_t vector_bytes(const SearchShape& shape, int64_t num_vectors) {
  const int64_t pass = search_vectors_per_pass(num_vectors);
  return shape.kv_heads_per_set() * divide_up(num_vectors, pass) * pass * shape.planes() *
         shape.dim * static_cast<int64_t>(sizeof(float));
}

SearchPlan plan_decode(const SearchShape& shape, const DeviceInfo& device) {
  SearchPlan plan;
  plan.list_registers = std::max(2, list_registers(shape.max_k));
  plan.vectors_per_block = shape.join == ScoreJoin::kNone
                               ? std::min(shape.vectors(), kSearchDecodeWarps)
                               : shape.vectors();
  const int lists = shape.join == ScoreJoin::kNone ? plan.vectors_per_block : 1;
  const int64_t max_rows = std::min<int64_t>(shape.num_rows, kSearchDecodeWarps / lists);
  plan.rows_per_block = static_cast<int>(std::max<int64_t>(1, max_rows));
  while (plan.rows_per_block > 1 &&
         vector_bytes(shape, plan.rows_per_block * plan.vectors_per_block) > kMaxVectorBytes) {
    --plan.rows_per_block;
  }
  const int64_t bytes = vector_bytes(shape, plan.rows_per_block * plan.vectors_per_block);
  plan.num_groups = divide_up(shape.num_rows, plan.rows_per_block) * shape.num_sets() *
                    divide_up(shape.vectors(), plan.vectors_per_block);
  plan.num_splits = static_cast<int>(
      std::clamp<int64_t>(device.num_sms / std::max<int64_t>(1, plan.num_groups),
                          1,
                          std::max<int64_t>(1, divide_up(shape.num_entries, kMinShareEntries))));
  plan.share_entries = static_cast<int>(
      divide_up(divide_up(shape.num_entries, plan.num_splits), kShareUnit) * kShareUnit);
  plan.num_blocks = plan.num_groups * plan.num_splits;
  const int64_t places = kPlacesPerRegister * plan.list_registers;
  plan.shared_bytes =
      static_cast<size_t>(bytes) +
      sizeof(uint64_t) * static_cast<size_t>(kSearchDecodeWarps * places) + kSearchLimitBytes +
      sizeof(float) * static_cast<size_t>(plan.rows_per_block * lists * kSearchRoundEntries);
  if (plan.num_splits > 1) {
    plan.workspace_bytes = sizeof(uint64_t) *
                           static_cast<size_t>(plan.num_blocks * plan.rows_per_block * lists) *
                           static_cast<size_t>(places);
    plan.num_tickets = plan.num_groups;
  }
  plan.supported = list_registers(shape.max_k) <= kMaxDecodeRegisters && bytes <= kMaxVectorBytes &&
                   plan.num_groups <= kMaxGroups &&
                   plan.shared_bytes <= device.shared_memory_per_block;
  return plan;
}

SearchPlan plan_prefill(const SearchShape& shape, const DeviceInfo& device) {
  SearchPlan plan;
  plan.prefill = true;
  plan.list_registers = list_registers(shape.max_k);
  plan.num_terms =
      shape.query_form == QueryForm::kEachHead && shape.query_dtype == shape.dtype ? 1 : 3;
  if (shape.score != ScoreForm::kDot || shape.join != ScoreJoin::kNone ||
      plan.list_registers > kMaxPrefillRegisters || shape.lists() > kSearchTileRows ||
      shape.dim > 128) {
    return plan;
  }
  const int64_t rows_per_block = kSearchTileRows / shape.lists();
  plan.rows_per_block = static_cast<int>(rows_per_block);
  plan.num_blocks = divide_up(shape.num_rows, rows_per_block) * shape.num_kv_heads;
  // The rows' buffers lie where their terms were.
  const int64_t buffers =
      kSearchTileRows * search_buffer_places(plan.list_registers) * int64_t{sizeof(uint64_t)};
  const int64_t terms = int64_t{kSearchTileRows} * plan.num_terms * shape.dim * 2;
  const int64_t stages = int64_t{kSearchPrefillStages} * kSearchStageEntries * shape.dim * 2;
  plan.shared_bytes = static_cast<size_t>(stages + std::max(buffers, terms));
  plan.supported =
      plan.num_blocks <= kMaxBlocks && plan.shared_bytes <= device.shared_memory_per_block;
  return plan;
}

}  // namespace

SearchPlan plan_search_topk(const SearchShape& shape, const DeviceInfo& device) {
  const bool fits = device.is_hopper() && shape.dtype != DataType::kFloat32 &&
                    (shape.dim == 64 || shape.dim == 128 || shape.dim == 192 || shape.dim == 256) &&
                    shape.num_entries <= kMaxIndex && shape.num_rows <= kMaxIndex;
  if (!fits) {
    return SearchPlan{};
  }
  const SearchPlan prefill = plan_prefill(shape, device);
  // A tile scans its entries alone: with few tiles the device would stand idle.
  if (prefill.supported && 2 * prefill.num_blocks >= device.num_sms) {
    return prefill;
  }
  return plan_decode(shape, device);
}

}  // namespace longspan::cuda
