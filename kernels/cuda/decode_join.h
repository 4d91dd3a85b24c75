// Device code of split-KV decode: joins the sums of warps that have attended to different tokens of
// the same item, each with a softmax of its own.
#pragma once

#include <cstdint>

#include "kernels/cuda/decode_attend.h"
#include "kernels/cuda/decode_shape.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda::decode {

struct WarpStatistics {
  float maximum;  // of logits in base 2
  float sum;
};

// A warp's place among the kWarps that are joined, and their shared memory.
template <int kWarps>
struct WarpJoin {
  float4* fragments;           // [kWarps][fragments of a round][32 lanes]
  WarpStatistics* statistics;  // [kWarps][kHeads]
  int barrier;                 // named,
  int num_threads;             // and who takes part in it
  int warp;
  int lane;

  __device__ void sync() const { ptx::named_barrier_sync(barrier, num_threads); }
};

// The weights of this warp's sums in the joined output, which is normalised by them, and the
// joined log-sum-exp, in base 2. Element [n][c] is of head 8n + 2 * (lane % 4) + c, as in the
// accumulator. When it returns, all warps have done with the
// pages that they attended to.
template <class S, int kWarps>
__device__ __forceinline__ void weigh_warps(const Accumulator<S>& sums,
                                            const WarpJoin<kWarps>& join,
                                            float (&weights)[S::kHeadTiles][2],
                                            float (&lse)[S::kHeadTiles][2]) {
#pragma unroll
  for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = sums.sum[n][c];
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, offset);
      }
      if (join.lane < 4) {
        join.statistics[join.warp * S::kHeads + n * 8 + join.lane * 2 + c] = {sums.maximum[n][c],
                                                                              sum};
      }
    }
  }
  join.sync();
#pragma unroll
  for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int head = n * 8 + join.lane % 4 * 2 + c;
      float maximum = -kInfinity;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        maximum = fmaxf(maximum, join.statistics[w * S::kHeads + head].maximum);
      }
      const float base = maximum == -kInfinity ? 0.0F : maximum;
      float total = 0.0F;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const WarpStatistics other = join.statistics[w * S::kHeads + head];
        total += other.sum * ptx::approximate_exp2(other.maximum - base);
      }
      const float own = ptx::approximate_exp2(sums.maximum[n][c] - base);
      weights[n][c] = total == 0.0F ? 0.0F : own / total;
      lse[n][c] = base + ptx::approximate_log2(total);
    }
  }
}

// Fragment `fragment` of a warp's output is of channel tile fragment / kHeadTiles and head tile
// fragment % kHeadTiles. Its elements: (channel, head), (channel, head + 1), (channel + 8, head),
// (channel + 8, head + 1).
template <class S>
struct FragmentPlace {
  int head;
  int channel;

  __device__ FragmentPlace(int fragment, int lane)
      : head(fragment % S::kHeadTiles * 8 + lane % 4 * 2),
        channel(fragment / S::kHeadTiles * 16 + lane / 4) {}
};

// Fragments [first, first + kRound) of all warps, weighted, to shared memory.
template <class S, int kWarps, int kRound>
__device__ __forceinline__ void share_fragments(const Accumulator<S>& sums,
                                                const WarpJoin<kWarps>& join,
                                                const float (&weights)[S::kHeadTiles][2],
                                                int first) {
#pragma unroll
  for (int i = 0; i < kRound; ++i) {
    const int n = (first + i) % S::kHeadTiles;
    const float(&part)[4] = sums.out[(first + i) / S::kHeadTiles][n];
    float weighted[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // what has no weight may be NaN
      weighted[j] = weights[n][j % 2] == 0.0F ? 0.0F : part[j] * weights[n][j % 2];
    }
    join.fragments[(join.warp * kRound + i) * kWarpSize + join.lane] =
        float4{weighted[0], weighted[1], weighted[2], weighted[3]};
  }
}

// The sum of fragment `i` of the round over all warps.
template <int kWarps, int kRound>
__device__ __forceinline__ float4 sum_fragment(const WarpJoin<kWarps>& join, int i) {
  float4 total = {0.0F, 0.0F, 0.0F, 0.0F};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float4 part = join.fragments[(w * kRound + i) * kWarpSize + join.lane];
    total.x += part.x;
    total.y += part.y;
    total.z += part.z;
    total.w += part.w;
  }
  return total;
}

}  // namespace longspan::cuda::decode
