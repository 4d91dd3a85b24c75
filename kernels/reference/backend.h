// The specification as a backend: every stage in double precision, one element at a time.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace longspan {

// Runs on the caller's thread; takes every well-formed method.
std::unique_ptr<Backend> make_reference_backend(const BackendOptions& options);

}  // namespace longspan
