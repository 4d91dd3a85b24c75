// Search on Hopper, fused: scores of block summaries and the best k of each list in one launch.
// Plain structures for the kernels; kernels/params.h says what is computed.
//
// Two kernels: decode (few rows; the entries are shared out over the blocks of the grid, and the
// last block of a list merges what all of them found) and prefill (tiles of 64 rows on tensor
// cores, each of which scans its entries alone).
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "kernels/cuda/search_policy.h"

namespace longspan::cuda {

struct SearchTopkArgs {
  SearchShape shape;

  const void* query = nullptr;  // [T][H][D] of shape.query_dtype
  // [ceil(num_entries / 64)] pages of shape.dtype: [G][64][D], for bounds minima and then maxima.
  const std::byte* const* pages = nullptr;

  const int64_t* candidate_begin = nullptr;  // [T]
  const int64_t* candidate_end = nullptr;    // [T]
  const int64_t* k = nullptr;                // [T], each at most shape.max_k

  float* scores = nullptr;  // [T][S][max_k]
  int64_t* ids = nullptr;   // [T][S][max_k]
};

// The plan is plan_search_topk's for the same shape, and supported. `workspace`:
// plan.workspace_bytes, uninitialised. `tickets`: plan.num_tickets, zero before the first call;
// every call leaves them zero.
cudaError_t launch_search_topk(const SearchTopkArgs& args,
                               const SearchPlan& plan,
                               std::byte* workspace,
                               uint32_t* tickets,
                               cudaStream_t stream);

// The two kernels, for launch_search_topk.
cudaError_t launch_search_decode(const SearchTopkArgs& args,
                                 const SearchPlan& plan,
                                 std::byte* workspace,
                                 uint32_t* tickets,
                                 cudaStream_t stream);
cudaError_t launch_search_prefill(const SearchTopkArgs& args,
                                  const SearchPlan& plan,
                                  cudaStream_t stream);

}  // namespace longspan::cuda
