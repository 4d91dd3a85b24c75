// Device code of the decode search: what a block works on, its shared memory, and its lists, from
// the scores of a round to the results.
#pragma once

#include <cstdint>

#include "kernels/cuda/search_policy.h"
#include "kernels/cuda/search_query.h"
#include "kernels/cuda/search_topk.h"
#include "kernels/cuda/top_k.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda {

// What a block works on. The shares of the entries follow from what the host knows, so that the
// first summaries are on their way before anything else has been read.
struct BlockWork {
  int first_row;  // of the query
  int num_rows;
  int first_vector;  // of each row
  int num_vectors;
  int num_lists;  // of each row
  int set;
  int begin;  // entries
  int end;

  __device__ int vectors() const { return num_rows * num_vectors; }
  __device__ int lists() const { return num_rows * num_lists; }
};

// Blocks are [num_groups][num_splits]; those of a group have the same lists.
__device__ __forceinline__ BlockWork block_work(const SearchShape& shape, const SearchPlan& plan) {
  BlockWork work;
  const auto group = static_cast<int>(blockIdx.y);
  const int parts = (shape.vectors() + plan.vectors_per_block - 1) / plan.vectors_per_block;
  work.set = group / parts % shape.num_sets();
  work.first_vector = group % parts * plan.vectors_per_block;
  work.num_vectors = min(plan.vectors_per_block, shape.vectors() - work.first_vector);
  work.num_lists = shape.join == ScoreJoin::kNone ? work.num_vectors : 1;
  work.first_row = group / parts / shape.num_sets() * plan.rows_per_block;
  work.num_rows = min(plan.rows_per_block, static_cast<int>(shape.num_rows) - work.first_row);
  const auto num_entries = static_cast<int>(shape.num_entries);
  work.begin = min(static_cast<int>(blockIdx.x) * plan.share_entries, num_entries);
  work.end = min(work.begin + plan.share_entries, num_entries);
  return work;
}

// What a row may choose from, and how many.
struct RowLimits {
  int begin;
  int end;
  int k;
};

struct SharedLayout {
  uint64_t* lists;    // [kSearchDecodeWarps][32 * registers]
  RowLimits* limits;  // [kSearchDecodeWarps], of the block's rows
  float* scores;      // [lists of the block][kSearchRoundEntries]
  float* vectors;     // [KV heads of the set][vectors of the block, padded][planes * D]
};

__device__ __forceinline__ SharedLayout shared_layout(int num_lists, int list_registers) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  SharedLayout layout;
  layout.lists = reinterpret_cast<uint64_t*>(shared_memory);
  layout.limits =
      reinterpret_cast<RowLimits*>(layout.lists + kSearchDecodeWarps * kWarpSize * list_registers);
  layout.scores = reinterpret_cast<float*>(layout.limits + kSearchDecodeWarps);
  layout.vectors = layout.scores + num_lists * kSearchRoundEntries;
  return layout;
}
static_assert(sizeof(RowLimits) * kSearchDecodeWarps == kSearchLimitBytes &&
              kSearchLimitBytes % 16 == 0);

// The warps are dealt to the lists, an equal number to each.
struct WarpDuty {
  int list;   // may be beyond the last one
  int part;   // of the warps that have this list
  int parts;  // a power of two
};

__device__ __forceinline__ WarpDuty warp_duty(int num_lists) {
  int parts = kSearchDecodeWarps;
  while (parts * num_lists > kSearchDecodeWarps) {
    parts /= 2;
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  return {warp / parts, warp % parts, parts};
}

// The warp's list takes in the round's scores. `count` of them, of the entries from `begin` on.
template <int kRegisters>
__device__ __noinline__ void select_round(const SearchTopkArgs& args,
                                          const SearchPlan& plan,
                                          int begin,
                                          int count) {
  const BlockWork work = block_work(args.shape, plan);
  const int num_lists = work.lists();
  const float divisor = args.shape.divisor;
  const bool first_round = begin == work.begin;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const WarpDuty duty = warp_duty(num_lists);
  if (duty.list >= num_lists) {
    return;
  }
  constexpr int kPlaces = kWarpSize * kRegisters;
  const SharedLayout shared = shared_layout(num_lists, kRegisters);
  const int row = duty.list / work.num_lists;
  const RowLimits limits = shared.limits[row];
  const float* scores = shared.scores + duty.list * kSearchRoundEntries;
  uint64_t* list = shared.lists + warp * kPlaces;
  uint64_t best[kRegisters];
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    best[r] = first_round ? kNoCandidate : list[r * kWarpSize + lane];
  }
  for (int base = duty.part * kPlaces; base < count; base += duty.parts * kPlaces) {
    const uint64_t worst = candidate_at(best, kPlaces - 1);
    uint64_t batch[kRegisters];
    bool better = false;
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      const int place = base + r * kWarpSize + lane;
      const int entry = begin + place;
      const bool candidate = place < count && entry >= limits.begin && entry < limits.end;
      float score = candidate ? scores[place] : 0.0F;
      if (!is_finite(score)) {
        score = exact_list_score(args,
                                 work.first_row + row,
                                 work.set,
                                 work.first_vector + duty.list % work.num_lists,
                                 entry);
      }
      batch[r] = candidate ? pack_candidate(divisor == 1.0F ? score : score / divisor,
                                            static_cast<uint32_t>(entry))
                           : kNoCandidate;
      better = better || batch[r] > worst;
    }
    if (__any_sync(kFullWarp, better)) {
      sort_list<Code::kShort, /*kAscending=*/true>(batch, lane);
      merge_ascending<Code::kShort>(best, batch, lane);
    }
  }
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    list[r * kWarpSize + lane] = best[r];
  }
}

// Leaves the best of the lists of `parts` warps in the first one's registers. All threads call it.
template <int kRegisters>
__device__ __forceinline__ void join_parts(
    uint64_t (&best)[kRegisters], uint64_t* list, int part, int parts, int lane) {
  constexpr int kPlaces = kWarpSize * kRegisters;
  for (int distance = parts / 2; distance >= 1; distance /= 2) {
    if (part >= distance && part < 2 * distance) {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        list[r * kWarpSize + lane] = best[r];
      }
    }
    __syncthreads();
    if (part < distance) {
      uint64_t ascending[kRegisters];
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        ascending[r] = list[distance * kPlaces + kPlaces - 1 - (r * kWarpSize + lane)];
      }
      merge_ascending<Code::kShort>(best, ascending, lane);
    }
  }
}

// The lists of a block's share are complete: merges them, and in the last block of the group those
// of all shares into the results.
template <int kRegisters>
__device__ __noinline__ void finish(const SearchTopkArgs& args,
                                    const SearchPlan& plan,
                                    uint64_t* part_lists,
                                    uint32_t* tickets) {
  constexpr int kPlaces = kWarpSize * kRegisters;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const BlockWork work = block_work(args.shape, plan);
  const int num_lists = work.lists();
  const SharedLayout shared = shared_layout(num_lists, kRegisters);
  const WarpDuty duty = warp_duty(num_lists);
  const bool has_list = duty.list < num_lists;
  uint64_t* list = shared.lists + warp * kPlaces;
  uint64_t best[kRegisters];
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    best[r] = has_list ? list[r * kWarpSize + lane] : kNoCandidate;
  }
  join_parts(best, list, duty.part, duty.parts, lane);

  if (plan.num_splits > 1) {
    const int64_t lists_per_group =
        static_cast<int64_t>(plan.rows_per_block) *
        (args.shape.join == ScoreJoin::kNone ? plan.vectors_per_block : 1);
    uint64_t* parts =
        part_lists + (blockIdx.y * lists_per_group + duty.list) * plan.num_splits * kPlaces;
    if (has_list && duty.part == 0) {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        parts[blockIdx.x * kPlaces + r * kWarpSize + lane] = best[r];
      }
    }
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const auto last = static_cast<unsigned>(plan.num_splits - 1);
      is_last = atomicInc(tickets + blockIdx.y, last) == last;
    }
    __syncthreads();
    if (!is_last) {
      return;
    }
    __threadfence();
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      best[r] = kNoCandidate;
    }
    uint64_t next[kRegisters];  // on its way while its predecessor is merged
    const auto fetch = [&](int split) {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        const int place = kPlaces - 1 - (r * kWarpSize + lane);
        next[r] = split < plan.num_splits ? __ldcg(parts + split * kPlaces + place) : kNoCandidate;
      }
    };
    if (has_list) {
      fetch(duty.part);
    }
    for (int split = duty.part; has_list && split < plan.num_splits; split += duty.parts) {
      uint64_t ascending[kRegisters];
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        ascending[r] = next[r];
      }
      fetch(split + duty.parts);
      merge_ascending<Code::kShort>(best, ascending, lane);
    }
    join_parts(best, list, duty.part, duty.parts, lane);
  }

  if (has_list && duty.part == 0) {
    const int row = duty.list / work.num_lists;
    const int64_t lists_of_row = static_cast<int64_t>(args.shape.num_sets()) * args.shape.lists();
    const int64_t index = (int64_t{work.first_row} + row) * lists_of_row +
                          work.set * args.shape.lists() + work.first_vector +
                          duty.list % work.num_lists;
    store_list(best,
               lane,
               shared.limits[row].k,
               args.shape.max_k,
               args.scores + index * args.shape.max_k,
               args.ids + index * args.shape.max_k);
  }
}

}  // namespace longspan::cuda
