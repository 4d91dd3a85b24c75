#include "worker/tensor_codec.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"

#include "base/checked.h"

namespace longspan {
namespace {

// The largest bit pattern of |value| among the elements. The loops are plain so that they
// vectorise.
template <class Bits>
Bits max_magnitude(const void* data, int64_t num_elements, Bits mask) {
  using Signed =
      std::make_signed_t<Bits>;  // magnitudes fit; signed maxima are baseline instructions
  const auto* bits = static_cast<const Bits*>(data);
  Signed largest = 0;
  for (int64_t i = 0; i < num_elements; ++i) {
    largest = std::max(largest, static_cast<Signed>(bits[i] & mask));
  }
  return static_cast<Bits>(largest);
}

// The smallest magnitude, as bits of `type`, that is not finite once stored as `stored_as`.
uint32_t first_bad_magnitude(DataType type, DataType stored_as) {
  // Half of the last unit above fp16's maximum 65504 rounds to infinity.
  constexpr uint32_t kFloat16Overflow = 0x477ff000U;
  // The same above bf16's maximum.
  constexpr uint32_t kBFloat16Overflow = 0x7f7f8000U;
  switch (type) {
    case DataType::kFloat32:
      if (stored_as == DataType::kFloat16) {
        return kFloat16Overflow;
      }
      return stored_as == DataType::kBFloat16 ? kBFloat16Overflow : 0x7f800000U;
    case DataType::kBFloat16:
      // The next bf16 above 65280 is 65536.
      return stored_as == DataType::kFloat16 ? 0x4780U : 0x7f80U;
    case DataType::kFloat16:
      return 0x7c00U;
  }
  return 0;
}

int element_type(const v1::Tensor& message, absl::string_view field, Findings& findings) {
  DataType type = DataType::kFloat32;
  if (decode_data_type(message.dtype(), type)) {
    return static_cast<int>(type);
  }
  const std::string path = field_path(field, "dtype");
  if (message.dtype() == v1::DATA_TYPE_FP8_E4M3 || message.dtype() == v1::DATA_TYPE_FP8_E5M2) {
    findings.add_unserved(path, "FP8 is not served");
  } else {
    findings.add_invalid(path, "must be FP32, FP16 or BF16");
  }
  return -1;
}

// Whether the shape is what the rule asks for.
bool check_shape(const v1::Tensor& message,
                 const TensorRule& rule,
                 absl::string_view field,
                 Findings& findings) {
  const std::string path = field_path(field, "shape");
  if (message.shape_size() != 3 || message.shape(1) != rule.num_heads ||
      message.shape(2) != rule.dim) {
    findings.add_invalid(path,
                         absl::StrCat("must be [tokens, ", rule.num_heads, ", ", rule.dim, "]"));
    return false;
  }
  if (rule.num_rows >= 0 ? message.shape(0) != rule.num_rows
                         : message.shape(0) < 1 || message.shape(0) > rule.max_rows) {
    findings.add_invalid(
        path,
        rule.num_rows >= 0
            ? absl::StrCat("must have ", rule.num_rows, " tokens, has ", message.shape(0))
            : absl::StrCat("must have 1 to ", rule.max_rows, " tokens, has ", message.shape(0)));
    return false;
  }
  return true;
}

}  // namespace

bool decode_data_type(v1::DataType wire, DataType& type) {
  switch (wire) {
    case v1::DATA_TYPE_FP32:
      type = DataType::kFloat32;
      return true;
    case v1::DATA_TYPE_FP16:
      type = DataType::kFloat16;
      return true;
    case v1::DATA_TYPE_BF16:
      type = DataType::kBFloat16;
      return true;
    default:
      return false;
  }
}

v1::DataType encode_data_type(DataType type) {
  switch (type) {
    case DataType::kFloat32:
      return v1::DATA_TYPE_FP32;
    case DataType::kFloat16:
      return v1::DATA_TYPE_FP16;
    case DataType::kBFloat16:
      return v1::DATA_TYPE_BF16;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

int64_t first_unstorable(TensorIn tensor, int64_t num_elements, DataType stored_as) {
  const uint32_t bad = first_bad_magnitude(tensor.dtype, stored_as);
  if (tensor.dtype == DataType::kFloat32) {
    constexpr uint32_t kMask = 0x7fffffffU;
    if (max_magnitude<uint32_t>(tensor.data, num_elements, kMask) < bad) {
      return -1;
    }
    const auto* bits = static_cast<const uint32_t*>(tensor.data);
    return std::find_if(bits, bits + num_elements, [&](uint32_t b) { return (b & kMask) >= bad; }) -
           bits;
  }
  constexpr uint16_t kMask = 0x7fffU;
  if (max_magnitude<uint16_t>(tensor.data, num_elements, kMask) < bad) {
    return -1;
  }
  const auto* bits = static_cast<const uint16_t*>(tensor.data);
  return std::find_if(bits, bits + num_elements, [&](uint16_t b) { return (b & kMask) >= bad; }) -
         bits;
}

DecodedTensor decode_tensor(const v1::Tensor& message,
                            const TensorRule& rule,
                            absl::string_view field,
                            Findings& findings) {
  const int type = element_type(message, field, findings);
  const bool right_shape = check_shape(message, rule, field, findings);
  if (message.has_region()) {
    findings.add_unserved(field_path(field, "region"), "shared memory is not served");
    return {};
  }
  if (type < 0 || !right_shape) {
    return {};
  }
  const auto data_type = static_cast<DataType>(type);
  if (rule.fp32_only && data_type != DataType::kFloat32) {
    findings.add_invalid(field_path(field, "dtype"), "must be FP32");
    return {};
  }
  const std::string& raw = message.raw();
  const auto num_elements = checked_product(message.shape(0), message.shape(1), message.shape(2));
  const auto num_bytes = checked_product(num_elements.value_or(-1), size_of(data_type));
  if (!num_bytes || static_cast<uint64_t>(*num_bytes) != raw.size()) {
    findings.add_invalid(field_path(field, "raw"),
                         absl::StrCat("must have as many bytes as the shape says",
                                      num_bytes ? absl::StrCat(", ", *num_bytes) : "",
                                      ", has ",
                                      raw.size()));
    return {};
  }
  const TensorIn tensor{data_type, raw.data()};
  const int64_t bad = first_unstorable(tensor, *num_elements, rule.stored_as);
  if (bad >= 0) {
    findings.add_invalid(
        field_path(field, "raw"),
        absl::StrCat(
            "element ", bad, " is not finite as ", std::string(to_string(rule.stored_as))));
    return {};
  }
  return {tensor, message.shape(0)};
}

void encode_tensor(const std::vector<float>& values,
                   std::initializer_list<int64_t> shape,
                   DataType type,
                   v1::Tensor& message) {
  message.set_dtype(encode_data_type(type));
  for (const int64_t size : shape) {
    message.add_shape(size);
  }
  std::string& raw = *message.mutable_raw();
  if (type == DataType::kFloat32) {
    raw.assign(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    return;
  }
  raw.resize(values.size() * sizeof(uint16_t));
  auto* out = reinterpret_cast<uint16_t*>(raw.data());
  if (type == DataType::kBFloat16) {
    std::transform(values.begin(), values.end(), out, float_to_bfloat16);
  } else {
    std::transform(values.begin(), values.end(), out, float_to_float16);
  }
}

}  // namespace longspan
