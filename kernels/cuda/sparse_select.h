// Device code of the sparse decode step: the best k of the scores that a cluster's blocks keep.
//
// No entry below the k-th largest of the maxima of disjoint groups is among the best, and a warp's
// entries are such a group (or four). The maxima are known to all blocks before the last entries
// are scored, and so is the threshold. The few survivors are sent to all blocks, where each is
// ranked by those that are better: nothing is sorted, and nothing goes through global memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/sparse_block.h"
#include "kernels/cuda/sparse_search.h"

namespace longspan::cuda::sparse {

// The largest number that at least k of the values reach; 0 if there are fewer. By one warp.
// `reached_by` counts the lane's values from a number on.
template <class ReachedBy>
__device__ __forceinline__ uint32_t find_threshold(const ReachedBy& reached_by, int k) {
  uint32_t found = 0;
  for (uint32_t bit = 1U << 31; bit != 0; bit >>= 1) {
    const uint32_t trial = found | bit;
    const int reached = __reduce_add_sync(kFullWarp, reached_by(trial));
    found = reached >= k ? trial : found;
    if (reached == k) {
      break;
    }
  }
  return found;
}

// Of the maxima of all groups. With one group a warp they are few enough for registers.
__device__ __forceinline__ uint32_t find_threshold(const KernelArgs& args,
                                                   const Memory& memory,
                                                   int k,
                                                   int lane) {
  const uint32_t* values = memory.maxima() + lane;
  const int count = args.plan.cluster_size * kSparseWorkerWarps * args.plan.groups_per_warp;
  if (args.plan.groups_per_warp > 1) {
    return find_threshold(
        [&](uint32_t trial) {
          int reached = 0;
#pragma unroll 8
          for (int i = 0; i < count; i += kWarpSize) {
            reached += values[i] >= trial ? 1 : 0;
          }
          return reached;
        },
        k);
  }
  constexpr int kMost = kSparseMaxCluster * kSparseWorkerWarps / kWarpSize;
  uint32_t own[kMost];
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    own[i] = i * kWarpSize < count ? values[i * kWarpSize] : 0;
  }
  return find_threshold(
      [&](uint32_t trial) {
        int reached = 0;
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
          reached += own[i] >= trial ? 1 : 0;
        }
        return reached;
      },
      k);
}

// Waits for the maxima of all blocks and makes the threshold of them. By one warp.
__device__ __forceinline__ void watch_maxima(const KernelArgs& args,
                                             const Memory& memory,
                                             int lane) {
  State& state = memory.state();
  ptx::barrier_wait(memory.maxima_full(), 0);
  const uint32_t threshold = find_threshold(args, memory, state.k, lane);
  if (lane == 0) {
    state.threshold = max(threshold, 1U);
  }
}

// The candidate at a place of this block's keys.
__device__ __forceinline__ uint64_t candidate_of(const Memory& memory,
                                                 const Unit& unit,
                                                 const Pages& pages,
                                                 int place) {
  const uint32_t key = memory.keys()[place];
  const int entry = pages.page(unit, place / kPageTokens) * kPageTokens + place % kPageTokens;
  return key == 0 ? kNoCandidate
                  : (static_cast<uint64_t>(key) << 32) | ~static_cast<uint32_t>(entry);
}

// Sends the block's candidates from `threshold` on to all blocks, and waits for theirs: the
// `exchange`-th time. All threads.
__device__ __forceinline__ void exchange_survivors(const KernelArgs& args,
                                                   const Memory& memory,
                                                   const Unit& unit,
                                                   const Pages& pages,
                                                   uint64_t threshold,
                                                   uint32_t exchange) {
  State& state = memory.state();
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int places = args.plan.segment_places;
#pragma unroll 1
  for (int place = thread; place < pages.count * kPageTokens; place += kThreads) {
    const uint64_t candidate = candidate_of(memory, unit, pages, place);
    if (candidate != kNoCandidate && candidate >= threshold) {
      const auto index = static_cast<int>(atomicAdd(&state.num_survivors, 1U));
      if (index < places) {
        memory.survivors()[index] = candidate;
      }
    }
  }
  __syncthreads();
  if (warp < unit.size) {
    const uint32_t count = state.num_survivors;
    const int sent = min(static_cast<int>(count), places);
    const uint32_t full = ptx::cluster_address(memory.survivors_full(), warp);
    if (lane == 0) {
      ptx::barrier_arrive_expect_cluster(full, static_cast<uint32_t>(sent * 8 + 4));
      ptx::store_cluster_async(
          ptx::cluster_address(ptx::shared_address(&state.counts[unit.rank]), warp), count, full);
    }
    const uint32_t segment =
        ptx::cluster_address(ptx::shared_address(memory.segments() + unit.rank * places), warp);
#pragma unroll 1
    for (int i = lane; i < sent; i += kWarpSize) {
      ptx::store_cluster_async(segment + static_cast<uint32_t>(i) * 8, memory.survivors()[i], full);
    }
  }
  ptx::barrier_wait(memory.survivors_full(), exchange & 1);
}

// Whether survivors fit: a segment's, and those of all. The same in every block of the cluster.
__device__ __forceinline__ bool survivors_fit(
    const KernelArgs& args, const Unit& unit, const uint32_t* counts, int lane, int& total) {
  const auto count = lane < unit.size ? static_cast<int>(counts[lane]) : 0;
  total = __reduce_add_sync(kFullWarp, count);
  return __reduce_max_sync(kFullWarp, count) <= args.plan.segment_places &&
         total <= kSparseMaxSurvivors;
}

// Where too many candidates reach the threshold (many equal scores, or nearly all of the best in
// few blocks), halves the range of thresholds until they fit: slow, and always ends, since
// candidates differ and k of them fit. All threads of the cluster.
__device__ __noinline__ inline void refine_survivors(const KernelArgs& args) {
  const Memory memory = block_memory(args);
  const Unit unit(args);
  State& state = memory.state();
  const Pages pages(unit, state.begin, state.end);
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  uint64_t low = static_cast<uint64_t>(state.threshold) << 32;  // at least k reach it
  uint64_t high = ~uint64_t{0};                                 // fewer than k reach it
  for (int round = 0;; ++round) {
    const uint64_t middle = low + (high - low) / 2;
    if (thread == 0) {
      state.refined = 0;
    }
    __syncthreads();
    uint32_t reached = 0;
#pragma unroll 1
    for (int place = thread; place < pages.count * kPageTokens; place += kThreads) {
      reached += candidate_of(memory, unit, pages, place) >= middle ? 1 : 0;
    }
    atomicAdd(&state.refined, reached);
    __syncthreads();
    uint32_t* counts = state.refined_counts[round % 2];
    if (thread < unit.size) {
      ptx::store_cluster(ptx::cluster_address(ptx::shared_address(counts + unit.rank), thread),
                         state.refined);
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    int total = 0;
    const bool fit = survivors_fit(args, unit, counts, lane, total);
    if (total < state.k) {
      high = middle;
    } else {
      low = middle;
      if (fit) {
        break;
      }
    }
  }
  __syncthreads();
  if (thread == 0) {
    state.num_survivors = 0;
  }
  __syncthreads();
  exchange_survivors(args, memory, unit, pages, low, 1);
}

// The survivors of all blocks, ranked: what a block does with each it decides by itself. All
// threads; returns how many there are.
template <class PageOf, class Place>
__device__ __forceinline__ int rank_survivors(const KernelArgs& args,
                                              const Memory& memory,
                                              const Unit& unit,
                                              const PageOf& page_of,
                                              const Place& place) {
  const State& state = memory.state();
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int count_of_lane = lane < unit.size ? static_cast<int>(state.counts[lane]) : 0;
  const int total = __reduce_add_sync(kFullWarp, count_of_lane);
  const int first = __reduce_add_sync(kFullWarp, lane < warp ? count_of_lane : 0);
  const int count = __shfl_sync(kFullWarp, count_of_lane, warp % kWarpSize);
  const uint64_t* segment = memory.segments() + warp * args.plan.segment_places;
  uint64_t own = kNoCandidate;
  const std::byte* page = nullptr;  // on its way while ranks are counted
  if (warp < unit.size) {
#pragma unroll 1
    for (int i = lane; i < count; i += kWarpSize) {
      memory.list()[first + i] = segment[i];
    }
    if (lane < count) {
      own = segment[lane];
      page = page_of(own);
    }
  }
  __syncthreads();
  constexpr int kLanes = 4;  // that count for a candidate
  for (int base = 0; base < total; base += kThreads / kLanes) {
    const int index = base + thread / kLanes;
    const uint64_t candidate = index < total ? memory.list()[index] : kNoCandidate;
    int better = 0;
#pragma unroll 4
    for (int i = thread % kLanes; i < total; i += kLanes) {
      better += memory.list()[i] > candidate ? 1 : 0;
    }
    better += __shfl_xor_sync(kFullWarp, better, 1);
    better += __shfl_xor_sync(kFullWarp, better, 2);
    if (index < total && thread % kLanes == 0) {
      memory.ranks()[index] = better;
    }
  }
  __syncthreads();
  if (warp < unit.size) {
#pragma unroll 1
    for (int i = lane; i < count; i += kWarpSize) {
      const uint64_t candidate = i == lane ? own : memory.list()[first + i];
      const int rank = memory.ranks()[first + i];
      if (rank < state.k) {
        place(rank, candidate, i == lane ? page : page_of(candidate));
      }
    }
  }
  return total;
}

}  // namespace longspan::cuda::sparse
