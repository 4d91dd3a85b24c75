// Device code of NSA's importance: the tokens of a warp while their blocks arrive, those of 64
// windows at a time, and the most important blocks of each.
#pragma once

#include <cstdint>

#include "kernels/cuda/importance.h"
#include "kernels/cuda/top_k.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda {

// A token and KV head.
struct alignas(32) ImportanceRow {
  int begin;  // candidates
  int end;
  int k;
  int visible;  // windows
  int count;    // in the buffer
  // What is not above it cannot be among the best any more: later blocks lose ties. NaN: nothing is
  // known yet, everything may.
  float threshold;
};
static_assert(sizeof(ImportanceRow) == kImportanceRowBytes);

// How windows and blocks lie.
struct Overlap {
  int windows_per_block;  // that start in it, a power of two up to 64
  int windows_before;     // that start before it and reach into it
  int blocks_shift;       // of the blocks of 64 windows: their number is 1 << blocks_shift

  // In strides, of the window that starts `offset` windows after the block.
  __device__ float weight(int offset) const {
    const int overlap = min(offset + windows_before + 1, windows_per_block) - max(offset, 0);
    return static_cast<float>(overlap);
  }
};

// Shared memory of a token: its list [32 * kRegisters], descending, and its buffer [64]; the sums
// of heads of its last windows [kImportanceRingStride], window i at i % 128.
template <int kRegisters>
class ImportanceRows {
 public:
  static constexpr int kPlaces = kWarpSize * kRegisters;

  __device__ ImportanceRows(ImportanceRow* rows, uint64_t* candidates, float* sums, int lane)
      : rows_(rows), candidates_(candidates), sums_(sums), lane_(lane) {}

  __device__ ImportanceRow& row(int token) const { return rows_[token]; }
  __device__ float* sums(int token) const { return sums_ + token * kImportanceRingStride; }

  // The warp's tokens are [first, first + count).
  __device__ void clear(int first, int count) const {
    for (int token = first; token < first + count; ++token) {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        list(token)[r * kWarpSize + lane_] = kNoCandidate;
      }
    }
    __syncwarp();
  }

  // Takes the blocks whose windows start in a stage. `divisor`: of the sums of heads.
  __device__ __forceinline__ void take_blocks(
      int first_token, int num_tokens, int stage, const Overlap& overlap, float divisor) const {
    const int blocks = 1 << overlap.blocks_shift;
    const int total = num_tokens << overlap.blocks_shift;
    // The lanes of a token.
    const int first_lane = lane_ & ~(blocks - 1);
    const uint32_t segment = blocks >= kWarpSize ? kFullWarp : ((1U << blocks) - 1U) << first_lane;
#pragma unroll 1
    for (int first = 0; first < total;) {
      const int index = first + lane_;
      const int token = first_token + min(index, total - 1) / blocks;
      const int block = (stage << overlap.blocks_shift) + index % blocks;
      const ImportanceRow own = rows_[token];
      bool passes = index < total && block >= own.begin && block < own.end;
      float score = 0.0F;
      if (passes) {
        score = importance(token, block, own.visible, overlap, divisor);
        passes = !(score <= own.threshold);
      }
      const uint32_t passing = __ballot_sync(kFullWarp, passes) & segment;
      const int arriving = __popc(passing);
      const uint32_t full = __ballot_sync(kFullWarp, own.count + arriving > kImportanceBuffer);
      if (full != 0) {
        make_room(full, token, blocks);  // fewer pass then, and an empty buffer has room for all
        continue;
      }
      const int before = __popc(passing & ((1U << lane_) - 1U));
      if (passes) {
        buffer(token)[own.count + before] = pack_candidate(score, static_cast<uint32_t>(block));
        if (before == 0) {
          rows_[token].count = own.count + arriving;
        }
      }
      __syncwarp();
      first += kWarpSize;
    }
  }

  // The best of a token, once all blocks have arrived.
  __device__ __forceinline__ void finish(int token, uint64_t (&best)[kRegisters]) const {
    merge(token, best);
  }

 private:
  __device__ uint64_t* list(int token) const {
    return candidates_ + token * (kPlaces + kImportanceBuffer);
  }
  __device__ uint64_t* buffer(int token) const { return list(token) + kPlaces; }

  __device__ __forceinline__ float importance(
      int token, int block, int visible, const Overlap& overlap, float divisor) const {
    const float* ring = sums(token);
    const int first = block * overlap.windows_per_block;
    float sum = 0.0F;
#pragma unroll 1
    for (int offset = -overlap.windows_before; offset < overlap.windows_per_block; ++offset) {
      const int window = first + offset;
      if (window >= 0 && window < visible) {
        sum = fmaf(overlap.weight(offset), ring[window % kImportanceRing], sum);
      }
    }
    sum = divisor == 1.0F ? sum : sum / divisor;
    return sum == sum ? sum : -__int_as_float(0x7f800000);
  }

  __device__ void make_room(uint32_t full, int token, int blocks) const {
    while (full != 0) {
      const int owner = __ffs(static_cast<int>(full)) - 1;
      uint64_t best[kRegisters];
      merge(__shfl_sync(kFullWarp, token, owner), best);
      const int next = (owner & ~(blocks - 1)) + blocks;  // lane of the next token
      full = next >= kWarpSize ? 0U : full >> next << next;
    }
  }

  // Merges the buffer into the list; `best` is the list then.
  __device__ __forceinline__ void merge(int token, uint64_t (&best)[kRegisters]) const {
    const int count = rows_[token].count;
    const int k = rows_[token].k;
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      best[r] = list(token)[r * kWarpSize + lane_];
    }
    uint64_t fresh[kImportanceBuffer / kWarpSize];
#pragma unroll
    for (int r = 0; r < kImportanceBuffer / kWarpSize; ++r) {
      const int place = r * kWarpSize + lane_;
      fresh[r] = place < count ? buffer(token)[place] : kNoCandidate;
    }
    sort_list<Code::kUnrolled, /*kAscending=*/true>(fresh, lane_);
    merge_ascending<Code::kUnrolled>(best, fresh, lane_);
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      list(token)[r * kWarpSize + lane_] = best[r];
    }
    const uint64_t last = k > 0 ? candidate_at(best, k - 1) : kNoCandidate;
    if (lane_ == 0) {
      rows_[token].count = 0;
      if (last != kNoCandidate) {
        rows_[token].threshold = candidate_score(last);
      }
    }
    __syncwarp();
  }

  ImportanceRow* rows_;
  uint64_t* candidates_;
  float* sums_;
  int lane_;
};

}  // namespace longspan::cuda
