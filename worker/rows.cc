#include "worker/rows.h"

#include <cstring>

namespace longspan {
namespace {

template <DataType kType>
using Element = std::conditional_t<kType == DataType::kFloat32, float, uint16_t>;

template <DataType kType>
float to_float(Element<kType> element) {
  if constexpr (kType == DataType::kFloat32) {
    return element;
  } else if constexpr (kType == DataType::kFloat16) {
    return float16_to_float(element);
  } else {
    return bfloat16_to_float(element);
  }
}

template <DataType kType>
Element<kType> from_float(float value) {
  if constexpr (kType == DataType::kFloat32) {
    return value;
  } else if constexpr (kType == DataType::kFloat16) {
    return float_to_float16(value);
  } else {
    return float_to_bfloat16(value);
  }
}

template <DataType kFrom, DataType kTo>
void convert(const void* source, void* target, size_t count) {
  const auto* from = static_cast<const Element<kFrom>*>(source);
  auto* to = static_cast<Element<kTo>*>(target);
  for (size_t i = 0; i < count; ++i) {
    to[i] = from_float<kTo>(to_float<kFrom>(from[i]));
  }
}

template <DataType kFrom>
void convert_from(const void* source, DataType to, void* target, size_t count) {
  switch (to) {
    case DataType::kFloat32:
      return convert<kFrom, DataType::kFloat32>(source, target, count);
    case DataType::kFloat16:
      return convert<kFrom, DataType::kFloat16>(source, target, count);
    case DataType::kBFloat16:
      return convert<kFrom, DataType::kBFloat16>(source, target, count);
  }
}

}  // namespace

void convert_elements(DataType from, const void* source, DataType to, void* target, size_t count) {
  if (from == to) {
    std::memcpy(target, source, count * size_of(to));
    return;
  }
  switch (from) {
    case DataType::kFloat32:
      return convert_from<DataType::kFloat32>(source, to, target, count);
    case DataType::kFloat16:
      return convert_from<DataType::kFloat16>(source, to, target, count);
    case DataType::kBFloat16:
      return convert_from<DataType::kBFloat16>(source, to, target, count);
  }
}

}  // namespace longspan
