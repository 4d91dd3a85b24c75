// Device code of the prefill search: the 16 rows of a warp while they scan the summaries, 64 at a
// time. Rows lane / 4 and lane / 4 + 8 are a lane's, shared with the other three lanes of its quad.
//
// A row has a threshold, below which nothing can be among its best, and a buffer of candidates
// above it, in any order. When a buffer is full, the four lanes of the row search for a higher
// threshold that still has k candidates above it, by bisection, all rows of the warp at a time.
// Only what is left at the end is sorted.
#pragma once

#include <cstdint>

#include "kernels/cuda/search_policy.h"
#include "kernels/cuda/search_query.h"
#include "kernels/cuda/search_topk.h"
#include "kernels/cuda/top_k.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda {

inline constexpr int kRowsOfWarp = 16;
inline constexpr int kColumnTiles = kSearchStageEntries / 8;  // of an mma

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// A row, as its four lanes know it.
struct Row {
  int begin = 0;  // candidates
  int end = 0;
  int k = 0;
  int count = 0;  // in the buffer
  // What is not above it cannot be among the best any more: later entries lose ties. NaN: nothing
  // is known yet, everything may.
  float threshold = 0.0F;
};

// `row`: of the tile.
__device__ __forceinline__ Row make_row(const SearchTopkArgs& args, int64_t first_token, int row) {
  const int lists = args.shape.lists();
  const int64_t token = first_token + row / lists;
  Row result;
  result.threshold = infinity();
  if (row < kSearchTileRows / lists * lists && token < args.shape.num_rows) {
    result.begin = static_cast<int>(args.candidate_begin[token]);
    result.end = static_cast<int>(args.candidate_end[token]);
    result.k = static_cast<int>(min(args.k[token], args.shape.max_k));
  }
  if (result.k > 0 && result.begin < result.end) {
    result.threshold = not_a_number();
  } else {
    result.begin = 0;
    result.end = 0;
  }
  return result;
}

struct Candidate {
  float score;
  uint32_t id;
};

// Scores of the warp's rows with the summaries of a stage, [column / 8][4] as mma_m16n8k16 has
// them.
using Scores = float[kColumnTiles][4];

// Columns of a stage that are taken at once: a lane has 8 of them in a row, column 8 n + 2
// quad_lane
// + e of a step in bit 2 n + e.
inline constexpr int kStepTiles = 4;
inline constexpr int kStepBits = 2 * kStepTiles;
static_assert(8 * kStepTiles == kSearchStepEntries);

// Those that are candidates of the row. `first`: the step's first entry.
__device__ __forceinline__ uint32_t candidate_columns(const Row& row, int first, int quad_lane) {
  uint32_t columns = 0;
#pragma unroll
  for (int bit = 0; bit < kStepBits; ++bit) {
    const int entry = first + bit / 2 * 8 + 2 * quad_lane + bit % 2;
    columns |= entry >= row.begin && entry < row.end ? 1U << bit : 0U;
  }
  return columns;
}

// Those that may be among the best; a NaN passes. `finite` becomes false where a score has to be
// corrected: what is -inf is so, but a NaN or an infinity may stand for it.
__device__ __forceinline__ uint32_t passing_columns(const Scores& scores,
                                                    int h,
                                                    float threshold,
                                                    bool& finite) {
  uint32_t columns = 0;
#pragma unroll
  for (int bit = 0; bit < kStepBits; ++bit) {
    const float score = scores[bit / 2][2 * h + bit % 2];
    columns |= !(score <= threshold) ? 1U << bit : 0U;
    finite = finite && score < infinity();
  }
  return columns;
}

// Over the four lanes of a row.
__device__ __forceinline__ int quad_sum(int value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullWarp, value, 2));
}
// The sum over the lanes of the row before this one, and over all.
__device__ __forceinline__ void quad_scan(int value, int quad_lane, int& before, int& total) {
  int sum = value;
  int other = __shfl_up_sync(kFullWarp, sum, 1, 4);
  sum += quad_lane >= 1 ? other : 0;
  other = __shfl_up_sync(kFullWarp, sum, 2, 4);
  sum += quad_lane >= 2 ? other : 0;
  before = sum - value;
  total = __shfl_sync(kFullWarp, sum, 3, 4);
}

// A number about half way from `low` to `high`: of the numbers themselves, or, every fourth time
// and where that fails, of their bits. So 32 bits are halved soon, whatever the scores are.
__device__ __forceinline__ float halfway(float low, float high, int iteration) {
  const float middle = 0.5F * low + 0.5F * high;
  if (iteration % 4 != 3 && middle > low && middle < high) {
    return middle;
  }
  const uint32_t first = ordered_bits(low);
  return ordered_score(first + (ordered_bits(high) - first) / 2);
}

// The warp's rows while they scan. Shared memory of a row: [kPlaces] candidates.
template <int kRegisters>
class RowBuffers {
 public:
  static constexpr int kPlaces = search_buffer_places(kRegisters);
  // Places that are left for the next step after every pruning.
  static constexpr int kMost = kPlaces - kSearchStepEntries;
  // Candidates that are sorted at the end.
  static constexpr int kSorted = kWarpSize * kRegisters;
  static_assert(kPlaces % 16 == 4 || kPlaces % 16 == 12, "eight rows do not share banks");
  static_assert(kMost >= kSorted, "the k best fit");

  // `candidates`: of the warp's rows.
  __device__ RowBuffers(Candidate* candidates, int lane) : candidates_(candidates), lane_(lane) {}

  // Behind the candidates of row lane / 4 + 8 h.
  __device__ Candidate* end(const Row& row, int h) const {
    return buffer(lane_ / 4 + 8 * h) + row.count;
  }

  // Puts the scores of `columns` there, from `place` on. Returns where they end.
  __device__ __forceinline__ Candidate* append(
      const Scores& scores, int h, uint32_t columns, int first_entry, Candidate* place) const {
    const auto first_id = static_cast<uint32_t>(first_entry + 2 * (lane_ % 4));
#pragma unroll
    for (int bit = 0; bit < kStepBits; ++bit) {
      if ((columns >> bit & 1U) != 0) {
        store(place++,
              {scores[bit / 2][2 * h + bit % 2],
               first_id + static_cast<uint32_t>(bit / 2 * 8 + bit % 2)});
      }
    }
    return place;
  }

  // Drops candidates of rows that have more than about 5/4 k, so that there is room for a step.
  __device__ __forceinline__ void make_room(Row (&rows)[2]) const {
    int limits[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      limits[h] = min(rows[h].k + rows[h].k / 4, kMost);
    }
    prune(rows, limits, kMost);
  }

  // Writes the k best of each row: scores and ids [max_k] of each.
  template <class Output>
  __device__ __forceinline__ void finish(Row (&rows)[2], Output output) const {
    prune(rows, {kSorted, kSorted}, kSorted);
    constexpr int kAtOnce = kRegisters == 1 ? 4 : 2;
#pragma unroll 1
    for (int first = 0; first < kRowsOfWarp; first += kAtOnce) {
      uint64_t keys[kAtOnce][kRegisters];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first + i;
        const int count =
            __shfl_sync(kFullWarp, row < 8 ? rows[0].count : rows[1].count, row % 8 * 4);
#pragma unroll
        for (int r = 0; r < kRegisters; ++r) {
          keys[i][r] = key(buffer(row), r * kWarpSize + lane_, count);
        }
      }
      sort_lists(keys, lane_);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        output(first + i, keys[i]);
      }
    }
  }

 private:
  // A lane's share of a row: places quad_lane + 4 i.
  static constexpr int kShare = kPlaces / 4;

  __device__ Candidate* buffer(int row) const { return candidates_ + row * kPlaces; }

  static __device__ __forceinline__ void store(Candidate* place, Candidate candidate) {
    *reinterpret_cast<uint2*>(place) = {__float_as_uint(candidate.score), candidate.id};
  }

  static __device__ __forceinline__ uint64_t key(const Candidate* candidates,
                                                 int place,
                                                 int count) {
    const uint2 bits = *reinterpret_cast<const uint2*>(candidates + min(place, kPlaces - 1));
    return place < count ? pack_candidate(__uint_as_float(bits.x), bits.y) : kNoCandidate;
  }

  // Rows with more than `limits` get a threshold that leaves at least k and at most so many, unless
  // many are equal; all have at most `most` afterwards.
  __device__ __forceinline__ void prune(Row (&rows)[2], const int (&limits)[2], int most) const {
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (__any_sync(kFullWarp, rows[h].count > limits[h])) {
        raise_threshold(rows[h], h, limits[h]);
        sort_crowded(rows[h], h, most);
      }
    }
  }

  __device__ __forceinline__ void raise_threshold(Row& row, int h, int limit) const {
    const int quad_lane = lane_ % 4;
    const Candidate* candidates = buffer(lane_ / 4 + 8 * h);
    float scores[kShare];
    float low = infinity();
    float high = -infinity();
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int place = 4 * i + quad_lane;
      const float score = candidates[place].score;
      scores[i] = place < row.count ? score : -infinity();
      low = place < row.count ? fminf(low, score) : low;
      high = fmaxf(high, scores[i]);
    }
    low = -quad_max(-low);
    high = quad_max(high);
    low = row.threshold == row.threshold ? row.threshold : low;

    const int before = row.count;
    bool searching = before > limit;
    // As many halvings as are usual. Rows that need more have many equal scores.
    constexpr int kIterations = 24;
#pragma unroll 1
    for (int i = 0; i < kIterations && __any_sync(kFullWarp, searching); ++i) {
      const float middle = halfway(low, high, i);
      int above[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < kShare; ++j) {
        above[j % 2] += scores[j] > middle ? 1 : 0;
      }
      const int total = quad_sum(above[0] + above[1]);
      if (searching) {
        const bool enough = total >= row.k;
        if (enough) {
          row.threshold = middle;
          row.count = total;
        }
        searching = row.count > limit && middle > low && middle < high;
        low = enough ? middle : low;
        high = enough ? high : middle;
      }
    }
    compact(scores, h, row.count < before, before, row.threshold);
  }

  // Keeps what is above the threshold, in rows for which that is wanted.
  __device__ __forceinline__ void compact(
      const float (&scores)[kShare], int h, bool wanted, int count, float threshold) const {
    const int quad_lane = lane_ % 4;
    Candidate* candidates = buffer(lane_ / 4 + 8 * h);
    constexpr int kAtOnce = 16;  // what a lane holds in registers
    int filled = 0;
#pragma unroll
    for (int first = 0; first < kShare; first += kAtOnce) {
      uint32_t ids[kAtOnce];
      uint32_t kept = 0;
#pragma unroll
      for (int i = 0; i < kAtOnce && first + i < kShare; ++i) {
        const int place = 4 * (first + i) + quad_lane;
        ids[i] = candidates[place].id;
        kept |= place < count && scores[first + i] > threshold ? 1U << i : 0U;
      }
      int before;
      int total;
      quad_scan(__popc(kept), quad_lane, before, total);
      __syncwarp();  // all have read: they write at or before what they have read
      kept = wanted ? kept : 0U;
      Candidate* place = candidates + filled + before;
#pragma unroll
      for (int i = 0; i < kAtOnce && first + i < kShare; ++i) {
        if ((kept >> i & 1U) != 0) {
          store(place++, {scores[first + i], ids[i]});
        }
      }
      filled += total;
    }
    __syncwarp();
  }

  // Rows that have more than `most` still: their k best by sorting. Rare.
  __device__ __forceinline__ void sort_crowded(Row& row, int h, int most) const {
    uint32_t crowded = __ballot_sync(kFullWarp, lane_ % 4 == 0 && row.count > most);
    while (crowded != 0) {
      const int owner = __ffs(static_cast<int>(crowded)) - 1;
      const int count = __shfl_sync(kFullWarp, row.count, owner);
      const int k = __shfl_sync(kFullWarp, row.k, owner);
      const float threshold = keep_best(buffer(owner / 4 + 8 * h), count, k, lane_);
      if (lane_ / 4 == owner / 4) {
        row.count = k;
        row.threshold = threshold;
      }
      crowded &= crowded - 1;
    }
  }

  // Leaves a row its k best, and returns the score of the last of them.
  static __device__ __noinline__ float keep_best(Candidate* candidates,
                                                 int count,
                                                 int k,
                                                 int lane) {
    constexpr int kKeys = kPlaces <= 4 * kWarpSize ? 4 : 8;
    uint64_t keys[kKeys];
#pragma unroll
    for (int r = 0; r < kKeys; ++r) {
      keys[r] = key(candidates, r * kWarpSize + lane, count);
    }
    sort_list<Code::kShort, /*kAscending=*/false>(keys, lane);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kKeys; ++r) {
      const int place = r * kWarpSize + lane;
      if (place < k) {
        store(candidates + place, {candidate_score(keys[r]), candidate_id(keys[r])});
      }
    }
    __syncwarp();
    return candidate_score(candidate_at(keys, k - 1));
  }

  Candidate* candidates_;
  int lane_;
};

}  // namespace longspan::cuda
