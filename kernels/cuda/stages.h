// The stages of the CUDA backend: kernels/params.h to launches. Every pointer of the parameters is
// device memory, but for the specs. Asynchronous on the stream: no stage waits for the device or
// reads device memory on the host.
#pragma once

#include <cuda_runtime.h>

#include "base/status.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/memory.h"
#include "kernels/params.h"

namespace longspan::cuda {

// Which kernels a backend may use. One kind alone is for tests: what it does not take goes to the
// portable kernels.
enum class Kernels : uint8_t { kAll, kPortable, kDecode, kTiles };

// What the stages share during one call.
struct Machine {
  DeviceInfo device;
  Kernels kernels = Kernels::kAll;
  Workspace workspace;
  DeviceBuffer tickets;  // zero before and after every call
  cudaStream_t stream = nullptr;
};

// By the kernels that suit the parameters and the device.
Status summarize(const SummarizeParams& params, Machine& machine);
Status search(const SearchParams& params, Machine& machine);
Status attend(const AttendParams& params, Machine& machine);
Status merge(const MergeParams& params, Machine& machine);

// Correct for every shape, type and list of spans that the backend supports, on sm_80 and later.
namespace portable {

Status summarize(const SummarizeParams& params, Machine& machine);
Status search(const SearchParams& params, Machine& machine);
Status attend(const AttendParams& params, Machine& machine);
Status merge(const MergeParams& params, Machine& machine);

}  // namespace portable

// Hopper alone, and there what they say that they support.
namespace hopper {

bool search_supports(const SearchParams& params, const Machine& machine);
Status search(const SearchParams& params, Machine& machine);

bool decode_supports(const AttendParams& params, const Machine& machine);
Status attend_decode(const AttendParams& params, Machine& machine);

// Queries of the cache's type: tensor cores would round others.
bool tiles_supports(const AttendParams& params, const Machine& machine);
Status attend_tiles(const AttendParams& params, Machine& machine);

}  // namespace hopper

}  // namespace longspan::cuda
