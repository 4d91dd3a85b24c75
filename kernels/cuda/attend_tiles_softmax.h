// Attention of many rows on Hopper: what a thread does with the scores that it holds, in the layout
// of wgmma (ptx.h): rows r and r + 8 of its warp, every fourth pair of columns.
#pragma once

#include "kernels/cuda/attend_tiles_layout.h"

namespace longspan::cuda::tiles {

// A value that all lanes have, so that the compiler knows: it may not reorder wgmma around branches
// that could be divergent.
__device__ __forceinline__ uint32_t uniform(uint32_t value) {
  return __shfl_sync(kAllLanes, value, 0);
}

// Scores of what a row does not see become -inf. Of s [64][kStepTokens]; `lists`: of the thread's
// two rows, `word`: the step's.
template <class C>
__device__ __forceinline__ void mask_scores(float (&s)[C::kStepTokens / 2],
                                            const Shared<C>& shared,
                                            int stage,
                                            uint32_t word,
                                            const int (&lists)[2]) {
#pragma unroll
  for (int page = 0; page < C::kStepPages; ++page) {
    const PageView view = view_of(word, page);
    if (view == PageView::kLists) {
      const uint32_t(&seers)[C::kMaxLists / 32] = shared.notes[stage].lists[page];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool seen = (seers[lists[r] / 32] >> (lists[r] % 32)) & 1;
#pragma unroll
        for (int block = page * 8; block < page * 8 + 8; ++block) {
          s[4 * block + 2 * r] = seen ? s[4 * block + 2 * r] : -kInfinity;
          s[4 * block + 2 * r + 1] = seen ? s[4 * block + 2 * r + 1] : -kInfinity;
        }
      }
    } else if (view == PageView::kColumns) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // From this thread's first column on.
        const uint64_t columns = shared.columns[page][lists[r]] >> (2 * (threadIdx.x % 4));
#pragma unroll
        for (int block = 0; block < 8; ++block) {
          const auto half = static_cast<uint32_t>(columns >> (32 * (block / 4)));
          const int i = 4 * (page * 8 + block) + 2 * r;
          s[i] = (half >> (8 * (block % 4))) & 1 ? s[i] : -kInfinity;
          s[i + 1] = (half >> (8 * (block % 4) + 1)) & 1 ? s[i + 1] : -kInfinity;
        }
      }
    }
  }
}

// logit = cap tanh(x / cap), by tanh(y) = 1 - 2 / (1 + e^(2y)), which is right at both infinities.
template <int kCount>
__device__ __forceinline__ void cap_scores(float (&s)[kCount], float cap_factor, float cap) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float power = ptx::approximate_exp2(s[i] * cap_factor);
    s[i] = cap - __fdividef(2.0F * cap, 1.0F + power);
  }
}

// The running softmax of this thread's two rows; `sum` of its own columns only.
struct RowState {
  // What the scores are held against: a row's maximum, or up to 2^kSlack below it.
  float reference[2] = {-kInfinity, -kInfinity};
  float sum[2] = {};
};

// Weights may grow to 2^kSlack before what was summed is scaled down: few steps need that.
inline constexpr float kSlack = 8.0F;

// The maximum of a row, over the four threads that hold it. NaNs are passed over.
template <int kCount>
__device__ __forceinline__ float row_maximum(const float (&s)[kCount], int r) {
  float maximum[2] = {s[2 * r], s[2 * r + 1]};
#pragma unroll
  for (int i = 4; i < kCount; i += 4) {
    maximum[0] = fmaxf(maximum[0], s[i + 2 * r]);
    maximum[1] = fmaxf(maximum[1], s[i + 2 * r + 1]);
  }
  float row = fmaxf(maximum[0], maximum[1]);
  row = fmaxf(row, __shfl_xor_sync(kAllLanes, row, 1));
  return fmaxf(row, __shfl_xor_sync(kAllLanes, row, 2));
}

// Replaces scores by weights 2^((s - reference) * factor); `rescale` is what the earlier weights
// are to be multiplied by.
template <int kCount>
__device__ __forceinline__ void softmax_step(float (&s)[kCount],
                                             RowState& state,
                                             float factor,
                                             float (&rescale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float maximum = row_maximum(s, r);
    const float before = state.reference[r];
    // Not where both are -inf: the difference is NaN.
    const bool grown = (maximum - before) * factor > kSlack;
    state.reference[r] = grown ? maximum : before;
    // A row that has seen nothing yet: (-inf) - (-inf) is not a number.
    const float base = state.reference[r] == -kInfinity ? 0.0F : state.reference[r] * factor;
    rescale[r] = grown ? ptx::approximate_exp2(fmaf(before, factor, -base)) : 1.0F;
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float weight = ptx::approximate_exp2(fmaf(s[i + 2 * r + j], factor, -base));
        s[i + 2 * r + j] = weight;
        sum[j] += weight;
      }
    }
    state.sum[r] = fmaf(state.sum[r], rescale[r], sum[0] + sum[1]);
  }
}

// A of O += P V: four columns of scores, two blocks of eight, to a register.
template <class T, int kCount>
__device__ __forceinline__ void pack_weights(uint32_t (&p)[kCount / 8][4],
                                             const float (&s)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      p[i][j] = ptx::pack<T>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
    }
  }
}

}  // namespace longspan::cuda::tiles
