// Device code: elements of fp32, fp16 and bf16 as floats, one by one and 16 bytes at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "base/data_type.h"

namespace longspan::cuda {

inline constexpr int kWarpSize = 32;

// Exact.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Round to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// Elements in 16 bytes.
template <class T>
inline constexpr int kVectorSize = 16 / static_cast<int>(sizeof(T));

// 16 bytes of T at an address aligned to 16 bytes, as floats.
template <class T>
__device__ __forceinline__ void load_vector(const T* address, float (&values)[kVectorSize<T>]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(address);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) {
    if constexpr (sizeof(T) == sizeof(float)) {
      values[i] = __uint_as_float(words[i]);
    } else {
      const auto half = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      T element;
      memcpy(&element, &half, sizeof(element));
      values[i] = to_float(element);
    }
  }
}

template <class T>
__device__ __forceinline__ void store_vector(T* address, const float (&values)[kVectorSize<T>]) {
  alignas(16) T elements[kVectorSize<T>];
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) {
    elements[i] = from_float<T>(values[i]);
  }
  *reinterpret_cast<uint4*>(address) = *reinterpret_cast<const uint4*>(elements);
}

// Element `index` of an array whose type is known at run time only.
__device__ __forceinline__ float load_as_float(DataType type, const void* data, size_t index) {
  switch (type) {
    case DataType::kFloat32:
      return static_cast<const float*>(data)[index];
    case DataType::kFloat16:
      return to_float(static_cast<const __half*>(data)[index]);
    case DataType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
  }
  return 0.0F;
}

__device__ __forceinline__ void store_as(DataType type, void* data, size_t index, float value) {
  switch (type) {
    case DataType::kFloat32:
      static_cast<float*>(data)[index] = value;
      return;
    case DataType::kFloat16:
      static_cast<__half*>(data)[index] = __float2half_rn(value);
      return;
    case DataType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
      return;
  }
}

// Calls `function` with a value of the element type that `type` names, and returns its result.
template <class Function>
auto with_element_type(DataType type, Function&& function) {
  switch (type) {
    case DataType::kFloat16:
      return function(__half{});
    case DataType::kBFloat16:
      return function(__nv_bfloat16{});
    case DataType::kFloat32:
      break;
  }
  return function(float{});
}

}  // namespace longspan::cuda
