// Reads numpy's .npy files: fp32, fp16 and (as numpy stores it, two opaque bytes) bf16.
#pragma once

#include <string>

#include "base/status.h"
#include "client/cpp/tensors.h"

namespace longspan::cli {

struct Array {
  std::string bytes;
  client::Rows rows;  // borrows the bytes
};

// [heads, dim], which becomes one token, or [tokens, heads, dim]. INVALID_ARGUMENT names the file.
Status read_npy(const std::string& path, Array& array);

}  // namespace longspan::cli
