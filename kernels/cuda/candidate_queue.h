// Device code: candidates as numbers, and the best of them as one block of threads keeps them. Keys
// differ pairwise, so what is kept does not depend on the order in which threads run.
#pragma once

#include <cstdint>

#include "kernels/cuda/portable.h"

namespace longspan::cuda {

// `place`: among the candidates of the row, whose ids ascend. -0 counts as 0.
__device__ inline CandidateKey candidate_key(float score, int64_t place) {
  const uint32_t bits = __float_as_uint(score + 0.0F);
  const uint32_t ordered = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  return CandidateKey{ordered} << 32 | (0xffffffffU - static_cast<uint32_t>(place));
}

__device__ inline float score_of(CandidateKey key) {
  const auto ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float((ordered & 0x80000000U) != 0 ? ordered ^ 0x80000000U : ~ordered);
}

__device__ inline int64_t place_of(CandidateKey key) {
  return int64_t{0xffffffffU - static_cast<uint32_t>(key)};
}

// What the threads of a block share of a queue, besides its keys.
struct QueueState {
  unsigned size;
  CandidateKey threshold;  // nothing at or below it is among the best
};

// The best k keys of all that were pushed. Every thread of the block calls every function.
class CandidateQueue {
 public:
  // keys: [capacity], a power of two and at least k + blockDim.x.
  __device__ CandidateQueue(QueueState& state, CandidateKey* keys, int64_t capacity, int64_t k)
      : state_(state), keys_(keys), capacity_(capacity), k_(k) {
    __syncthreads();  // whoever had the state before is done with it
    if (threadIdx.x == 0) {
      state_.size = 0;
      state_.threshold = k > 0 ? 0 : ~CandidateKey{0};
    }
    __syncthreads();
  }

  // A key of each thread; 0 for none.
  __device__ void push(CandidateKey key) {
    if (key > state_.threshold) {
      keys_[atomicAdd(&state_.size, 1U)] = key;
    }
    __syncthreads();
    const int64_t filled = state_.size;
    __syncthreads();
    if (filled + blockDim.x > capacity_) {
      sort();
    }
  }

  // Orders the keys, largest first, and drops those that are not among the best k.
  __device__ void sort() {
    const int64_t filled = state_.size;
    int64_t padded = 1;
    while (padded < filled) {
      padded *= 2;
    }
    for (int64_t i = filled + threadIdx.x; i < padded; i += blockDim.x) {
      keys_[i] = 0;
    }
    __syncthreads();
    for (int64_t run = 2; run <= padded; run *= 2) {
      for (int64_t distance = run / 2; distance > 0; distance /= 2) {
        exchange(padded, run, distance);
      }
    }
    if (threadIdx.x == 0) {
      state_.size = static_cast<unsigned>(min(filled, k_));
      if (filled >= k_ && k_ > 0) {
        state_.threshold = keys_[k_ - 1];
      }
    }
    __syncthreads();
  }

  // After sort().
  __device__ int64_t size() const { return state_.size; }
  __device__ CandidateKey operator[](int64_t i) const { return keys_[i]; }

 private:
  // One step of the bitonic network, descending.
  __device__ void exchange(int64_t padded, int64_t run, int64_t distance) {
    for (int64_t pair = threadIdx.x; pair < padded / 2; pair += blockDim.x) {
      const int64_t low = 2 * pair - (pair & (distance - 1));
      const int64_t high = low + distance;
      const bool descending = (low & run) == 0;
      const CandidateKey first = keys_[low];
      const CandidateKey second = keys_[high];
      if ((first < second) == descending) {
        keys_[low] = second;
        keys_[high] = first;
      }
    }
    __syncthreads();
  }

  QueueState& state_;
  CandidateKey* keys_;
  int64_t capacity_;
  int64_t k_;
};

}  // namespace longspan::cuda
