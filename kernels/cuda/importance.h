// NSA's importance of blocks on Hopper, and the most important ones of each row, in one launch:
//
//   p[h][i] = exp(scale q_h . k_i - lse_h),  importance[j] = sum over heads and windows i that
//   overlap block j of overlap / stride * p[h][i]
//
// on tensor cores, without the p's in memory. kernels/params.h (kSoftmax) says what is computed;
// the heads of a KV head are added up. Plain structures for the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "kernels/cuda/importance_policy.h"

namespace longspan::cuda {

struct ImportanceArgs {
  ImportanceShape shape;

  const void* query = nullptr;  // [T][H][D] of shape.query_dtype
  // [ceil(num_windows / 64)] pages of shape.dtype that begin with keys [G][64][D].
  const std::byte* const* pages = nullptr;
  const float* lse = nullptr;  // [T][H]
  float scale = 1.0F;

  const int64_t* visible_windows = nullptr;  // [T]
  const int64_t* candidate_begin = nullptr;  // [T], blocks
  const int64_t* candidate_end = nullptr;    // [T]
  const int64_t* k = nullptr;                // [T], each at most shape.max_k

  float* scores = nullptr;  // [T][G][max_k]
  int64_t* ids = nullptr;   // [T][G][max_k]
};

// The plan is plan_importance's for the same shape, and not declined. `workspace`:
// plan.workspace_bytes, uninitialised. `tickets`: plan.num_tickets, zero before the first call;
// every call leaves them zero.
cudaError_t launch_importance(const ImportanceArgs& args,
                              const ImportancePlan& plan,
                              std::byte* workspace,
                              uint32_t* tickets,
                              cudaStream_t stream);

}  // namespace longspan::cuda
