// Element types of tensors and caches, and their exact conversions.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace longspan {

enum class DataType : uint8_t { kFloat32, kFloat16, kBFloat16 };

constexpr size_t size_of(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }

constexpr std::string_view to_string(DataType type) {
  switch (type) {
    case DataType::kFloat32:
      return "fp32";
    case DataType::kFloat16:
      return "fp16";
    case DataType::kBFloat16:
      return "bf16";
  }
  return "?";
}

// Round to nearest, ties to even; NaN stays NaN.
constexpr uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) {
    return static_cast<uint16_t>((bits >> 16) | 0x40U);
  }
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

constexpr float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest, ties to even; overflow goes to infinity, NaN stays NaN.
constexpr uint16_t float_to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {
    return static_cast<uint16_t>(sign | 0x7e00U);
  }
  if (magnitude >= 0x477ff000U) {  // rounds to 2^16 or more
    return static_cast<uint16_t>(sign | 0x7c00U);
  }
  if (magnitude <
      0x38800000U) {  // below 2^-14: subnormal; adding 0.5 aligns the result's bits and rounds them
    const float aligned = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(aligned) - 0x3f000000U));
  }
  const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

constexpr float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t magnitude = half & 0x7fffU;
  if (magnitude >= 0x7c00U) {  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7f800000U | ((magnitude & 0x3ffU) << 13));
  }
  if (magnitude < 0x400U) {  // zero, subnormal: magnitude * 2^-24
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8F;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000U));
}

// Element `index` of a row-major array of `type` at `data`.
inline float load_element(DataType type, const void* data, size_t index) {
  switch (type) {
    case DataType::kFloat32:
      return static_cast<const float*>(data)[index];
    case DataType::kFloat16:
      return float16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DataType::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(data)[index]);
  }
  return 0.0F;
}

inline void store_element(DataType type, void* data, size_t index, float value) {
  switch (type) {
    case DataType::kFloat32:
      static_cast<float*>(data)[index] = value;
      return;
    case DataType::kFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_float16(value);
      return;
    case DataType::kBFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_bfloat16(value);
      return;
  }
}

}  // namespace longspan
