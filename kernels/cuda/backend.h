// The CUDA backend: the stages on one NVIDIA GPU.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace longspan {

// Runs on the device that is current where it is made. The pointers of its calls are device memory;
// its streams are cuda::CudaStream, or a plain Stream for the default stream of the device. Without
// a device it is made all the same, and supports() says that there is none.
std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options);

}  // namespace longspan
