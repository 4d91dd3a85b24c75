// Device code: the best k of many candidates, by sorted lists in the registers of a warp.
//
// A candidate is one number, larger where it is better: the score's bits, brought into order, above
// the inverted id. So a tie falls to the lower id, every order of merging ends in the same list,
// and 0 is no candidate.
#pragma once

#include <cstdint>

#include "kernels/cuda/warp.h"

namespace longspan::cuda {

inline constexpr uint64_t kNoCandidate = 0;

// Bits that ascend as the numbers do, and back. No NaN.
__device__ __forceinline__ uint32_t ordered_bits(float score) {
  const uint32_t bits = __float_as_uint(score);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffU : 0x80000000U);
}
__device__ __forceinline__ float ordered_score(uint32_t bits) {
  return __uint_as_float(bits ^ ((bits >> 31) != 0 ? 0x80000000U : 0xffffffffU));
}

// NaN counts as -inf, and -0 as 0.
__device__ __forceinline__ uint64_t pack_candidate(float score, uint32_t id) {
  const float ordered = score != score ? -__int_as_float(0x7f800000) : score + 0.0F;
  return (static_cast<uint64_t>(ordered_bits(ordered)) << 32) | static_cast<uint32_t>(~id);
}

__device__ __forceinline__ float candidate_score(uint64_t candidate) {
  return ordered_score(static_cast<uint32_t>(candidate >> 32));
}

__device__ __forceinline__ uint32_t candidate_id(uint64_t candidate) {
  return ~static_cast<uint32_t>(candidate);
}

// A list of 32 * kRegisters candidates: rank 32 * r + lane is keys[r] of that lane.
//
// Lists are sorted and merged by bitonic networks. In a step of such a network, of ranks i and
// i + stride the larger goes to the lower one, but to the higher one in every second run of `size`
// ranks; kAscending turns both around.

// A step between lanes: stride < 32.
template <bool kAscending, int kRegisters>
__device__ __forceinline__ void step_lanes(uint64_t (&keys)[kRegisters],
                                           int lane,
                                           int size,
                                           int stride) {
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, keys[r], stride);
    const bool descending = (((r * 32 + lane) & size) == 0) != kAscending;
    const bool takes_larger = ((lane & stride) == 0) == descending;
    keys[r] = (keys[r] > other) == takes_larger ? keys[r] : other;
  }
}

// A step within lanes: stride >= 32.
template <bool kAscending, int kSize, int kStride, int kRegisters>
__device__ __forceinline__ void step_registers(uint64_t (&keys)[kRegisters]) {
  constexpr int kDistance = kStride / 32;
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    if ((r & kDistance) == 0) {
      const bool descending = (((r * 32) & kSize) == 0) != kAscending;
      const uint64_t low = keys[r];
      const uint64_t high = keys[r + kDistance];
      const bool keep = (low > high) == descending;
      keys[r] = keep ? low : high;
      keys[r + kDistance] = keep ? high : low;
    }
  }
}

// Code that runs a few times only is kept short: its loops over lanes are not unrolled.
enum class Code : uint8_t { kShort, kUnrolled };

// The steps that end in sorted runs of kSize ranks.
template <Code kCode, bool kAscending, int kSize, int kStride = kSize / 2, int kRegisters>
__device__ __forceinline__ void merge_runs(uint64_t (&keys)[kRegisters], int lane) {
  if constexpr (kStride >= 32) {
    step_registers<kAscending, kSize, kStride>(keys);
    merge_runs<kCode, kAscending, kSize, kStride / 2>(keys, lane);
  } else if constexpr (kCode == Code::kShort) {
#pragma unroll 1
    for (int stride = kStride; stride >= 1; stride /= 2) {
      step_lanes<kAscending>(keys, lane, kSize, stride);
    }
  } else {
#pragma unroll
    for (int stride = kStride; stride >= 1; stride /= 2) {
      step_lanes<kAscending>(keys, lane, kSize, stride);
    }
  }
}

template <Code kCode, bool kAscending, int kRegisters, int kSize = 2>
__device__ __forceinline__ void sort_list(uint64_t (&keys)[kRegisters], int lane) {
  if constexpr (kCode == Code::kShort && kSize < 32) {
#pragma unroll 1
    for (int size = 2; size <= 16; size *= 2) {
#pragma unroll 1
      for (int stride = size / 2; stride >= 1; stride /= 2) {
        step_lanes<kAscending>(keys, lane, size, stride);
      }
    }
    sort_list<kCode, kAscending, kRegisters, 32>(keys, lane);
  } else {
    merge_runs<kCode, kAscending, kSize>(keys, lane);
    if constexpr (kSize < 32 * kRegisters) {
      sort_list<kCode, kAscending, kRegisters, 2 * kSize>(keys, lane);
    }
  }
}

// Sorts several lists side by side, descending.
template <int kLists, int kRegisters, int kSize = 2, int kStride = kSize / 2>
__device__ __forceinline__ void sort_lists(uint64_t (&keys)[kLists][kRegisters], int lane) {
#pragma unroll
  for (int list = 0; list < kLists; ++list) {
    if constexpr (kStride >= 32) {
      step_registers</*kAscending=*/false, kSize, kStride>(keys[list]);
    } else {
      step_lanes</*kAscending=*/false>(keys[list], lane, kSize, kStride);
    }
  }
  if constexpr (kStride > 1) {
    sort_lists<kLists, kRegisters, kSize, kStride / 2>(keys, lane);
  } else if constexpr (kSize < 32 * kRegisters) {
    sort_lists<kLists, kRegisters, 2 * kSize>(keys, lane);
  }
}

// Leaves in `keys`, descending, the best of it and of another list, which comes ascending. The
// other one may be shorter: it then takes the place of the last ranks.
template <Code kCode, int kRegisters, int kOthers>
__device__ __forceinline__ void merge_ascending(uint64_t (&keys)[kRegisters],
                                                const uint64_t (&ascending)[kOthers],
                                                int lane) {
  constexpr int kShared = kOthers < kRegisters ? kOthers : kRegisters;
#pragma unroll
  for (int i = 0; i < kShared; ++i) {
    uint64_t& key = keys[kRegisters - kShared + i];
    const uint64_t other = ascending[kOthers - kShared + i];
    key = key > other ? key : other;
  }
  merge_runs<kCode, /*kAscending=*/false, 32 * kRegisters>(keys, lane);
}

// The candidate of a rank, in every lane.
template <int kRegisters>
__device__ __forceinline__ uint64_t candidate_at(const uint64_t (&keys)[kRegisters], int rank) {
  uint64_t result = kNoCandidate;
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    const uint64_t key = __shfl_sync(kFullWarp, keys[r], rank % 32);
    result = rank / 32 == r ? key : result;
  }
  return result;
}

// Writes the first `k` candidates of a list, and -inf and -1 in the other places: scores and ids
// [max_k].
template <int kRegisters>
__device__ __forceinline__ void store_list(const uint64_t (&keys)[kRegisters],
                                           int lane,
                                           int64_t k,
                                           int64_t max_k,
                                           float* scores,
                                           int64_t* ids) {
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    const int place = 32 * r + lane;
    if (place < max_k) {
      const bool used = place < k && keys[r] != kNoCandidate;
      scores[place] = used ? candidate_score(keys[r]) : -__int_as_float(0x7f800000);
      ids[place] = used ? static_cast<int64_t>(candidate_id(keys[r])) : -1;
    }
  }
}

}  // namespace longspan::cuda
