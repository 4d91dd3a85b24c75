// Rows of attention that are made again, one by one: those that values which are not finite reached
// by way of other rows' tokens.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "kernels/params.h"

namespace longspan::cuda {

// In device memory.
struct RepairList {
  int32_t* count = nullptr;
  int32_t* rows = nullptr;  // [count], t * H + h; there is room for all
};

// Asynchronous on the stream, right behind the kernel that writes the list: it may start before
// that one has ended, and then waits for it.
cudaError_t launch_attend_repair(const AttendParams& params,
                                 const RepairList& list,
                                 int num_sms,
                                 cudaStream_t stream);

}  // namespace longspan::cuda
