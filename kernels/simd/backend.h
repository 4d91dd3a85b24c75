// The CPU backend: Highway, dispatched at run time, threads over the rows of a call.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace longspan {

std::unique_ptr<Backend> make_simd_backend(const BackendOptions& options);

}  // namespace longspan
