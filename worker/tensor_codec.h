// Tensors of the wire: checked against what a call may bring, and written from results.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "absl/strings/string_view.h"

#include "longspan/v1/tensor.pb.h"

#include "base/data_type.h"
#include "worker/findings.h"
#include "worker/group.h"

namespace longspan {

// What a tensor of shape [rows, heads, dim] must be.
struct TensorRule {
  int64_t num_rows = -1;  // -1: any, at least 1 and at most max_rows
  int64_t max_rows = 0;
  int64_t num_heads = 0;
  int64_t dim = 0;
  // Values must be finite here too: the type that they are stored in.
  DataType stored_as = DataType::kFloat32;
  bool fp32_only = false;
};

// The tensor in the message's own memory, and its rows. Null data when something was found wrong.
struct DecodedTensor {
  TensorIn tensor;
  int64_t num_rows = 0;
};
DecodedTensor decode_tensor(const v1::Tensor& message,
                            const TensorRule& rule,
                            absl::string_view field,
                            Findings& findings);

// Index of the first element that is NaN, infinite, or becomes infinite in `stored_as`; -1: none.
int64_t first_unstorable(TensorIn tensor, int64_t num_elements, DataType stored_as);

bool decode_data_type(v1::DataType wire, DataType& type);
v1::DataType encode_data_type(DataType type);

// values: row-major, of the shape.
void encode_tensor(const std::vector<float>& values,
                   std::initializer_list<int64_t> shape,
                   DataType type,
                   v1::Tensor& message);

}  // namespace longspan
