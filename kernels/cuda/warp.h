// Device code: reductions over the 32 lanes of a warp. Every lane takes part and gets the result.
#pragma once

#include <cstdint>

#include "kernels/cuda/convert.h"

namespace longspan::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffU;

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// A NaN is passed over, unless all are NaN.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

__device__ __forceinline__ double warp_max(double value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fmax(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

}  // namespace longspan::cuda
