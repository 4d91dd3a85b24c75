// Random rows of tensors: normally distributed, never zero, reproducible by seed, and fast enough
// to fill a million tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/data_type.h"
#include "client/cpp/tensors.h"

namespace longspan::cli {

class RandomRows {
 public:
  explicit RandomRows(uint64_t seed);

  // Overwrites `storage`, which must outlive the answer.
  client::Rows make(
      std::string& storage, DataType dtype, int64_t num_tokens, int64_t num_heads, int64_t dim);

 private:
  uint64_t next();

  uint64_t state_;
  std::vector<float> normals_;  // a power of two of them
};

}  // namespace longspan::cli
