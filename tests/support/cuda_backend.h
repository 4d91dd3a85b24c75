// The CUDA backend behind host pointers, so that the conformance suite runs on it as on any other.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace longspan::testing {

// Copies the arrays of each call to the device, the pages into one arena, and the results back from
// device memory that held poison. A query goes over in the type of the cache where that loses
// nothing, so that both ways in are tried.
std::unique_ptr<Backend> make_cuda_test_backend();

}  // namespace longspan::testing
