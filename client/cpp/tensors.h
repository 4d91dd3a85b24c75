// Rows in the caller's memory to wire tensors, and back.
#pragma once

#include <cstdint>
#include <vector>

#include "longspan/v1/tensor.pb.h"

#include "base/data_type.h"
#include "base/status.h"

namespace longspan::client {

// Row-major [tokens][heads][dim] elements that live for the call. Without data: absent.
struct Rows {
  DataType dtype = DataType::kFloat32;
  const void* data = nullptr;
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  int64_t dim = 0;

  int64_t row_bytes() const {
    return num_heads * dim * static_cast<int64_t>(longspan::size_of(dtype));
  }
  // Rows [begin, end).
  Rows cut(int64_t begin, int64_t end) const;
};

// What a query brings along; only `query` is always needed.
struct AttentionRows {
  Rows query = {};         // [tokens][query heads][key dim]
  Rows key = {};           // [tokens][kv heads][key dim]
  Rows value = {};         // [tokens][kv heads][value dim]
  Rows gates = {};         // [tokens][query heads][branches], fp32
  Rows search_query = {};  // [tokens][query heads][key dim]

  AttentionRows cut(int64_t begin, int64_t end) const;
  int64_t row_bytes() const;
};

v1::DataType to_wire(DataType type);
void fill_tensor(const Rows& rows, v1::Tensor& tensor);

// Sets the fields query, key, value, gates and search_query of a chunk, an item or a request.
template <typename Message>
void fill_rows(const AttentionRows& rows, Message& message) {
  fill_tensor(rows.query, *message.mutable_query());
  if constexpr (requires { message.mutable_key(); }) {
    if (rows.key.data != nullptr) {
      fill_tensor(rows.key, *message.mutable_key());
    }
    if (rows.value.data != nullptr) {
      fill_tensor(rows.value, *message.mutable_value());
    }
  }
  if (rows.gates.data != nullptr) {
    fill_tensor(rows.gates, *message.mutable_gates());
  }
  if (rows.search_query.data != nullptr) {
    fill_tensor(rows.search_query, *message.mutable_search_query());
  }
}

// Elements in row-major order. INTERNAL when the size does not fit the shape.
StatusOr<std::vector<float>> to_floats(const v1::Tensor& tensor);

}  // namespace longspan::client
