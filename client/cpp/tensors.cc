#include "client/cpp/tensors.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

#include "base/checked.h"

namespace longspan::client {
namespace {

StatusOr<DataType> from_wire(v1::DataType type) {
  switch (type) {
    case v1::DATA_TYPE_FP32:
      return DataType::kFloat32;
    case v1::DATA_TYPE_FP16:
      return DataType::kFloat16;
    case v1::DATA_TYPE_BF16:
      return DataType::kBFloat16;
    default:
      return absl::UnimplementedError(
          absl::StrCat("tensors of type ", v1::DataType_Name(type), " are not read here"));
  }
}

}  // namespace

Rows Rows::cut(int64_t begin, int64_t end) const {
  if (data == nullptr) {
    return *this;
  }
  Rows part = *this;
  part.data = static_cast<const char*>(data) + begin * row_bytes();
  part.num_tokens = std::min(end, num_tokens) - begin;
  return part;
}

AttentionRows AttentionRows::cut(int64_t begin, int64_t end) const {
  return {query.cut(begin, end),
          key.cut(begin, end),
          value.cut(begin, end),
          gates.cut(begin, end),
          search_query.cut(begin, end)};
}

int64_t AttentionRows::row_bytes() const {
  return query.row_bytes() + key.row_bytes() + value.row_bytes() + gates.row_bytes() +
         search_query.row_bytes();
}

v1::DataType to_wire(DataType type) {
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

void fill_tensor(const Rows& rows, v1::Tensor& tensor) {
  tensor.set_dtype(to_wire(rows.dtype));
  tensor.add_shape(rows.num_tokens);
  tensor.add_shape(rows.num_heads);
  tensor.add_shape(rows.dim);
  tensor.set_raw(rows.data, static_cast<size_t>(rows.num_tokens * rows.row_bytes()));
}

StatusOr<std::vector<float>> to_floats(const v1::Tensor& tensor) {
  LONGSPAN_ASSIGN_OR_RETURN(const DataType type, from_wire(tensor.dtype()));
  std::optional<int64_t> count = 1;
  for (const int64_t extent : tensor.shape()) {
    count = count ? checked_product(*count, extent) : count;
  }
  const auto bytes = count ? checked_product(*count, size_of(type)) : std::nullopt;
  if (!bytes || *bytes != static_cast<int64_t>(tensor.raw().size())) {
    return absl::InternalError("the server sent a tensor whose size does not fit its shape");
  }
  std::vector<float> elements(static_cast<size_t>(*count));
  for (size_t index = 0; index < elements.size(); ++index) {
    elements[index] = load_element(type, tensor.raw().data(), index);
  }
  return elements;
}

}  // namespace longspan::client
