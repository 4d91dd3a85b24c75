// The sparse decode step on Hopper in one launch: block summaries are searched, and the best blocks
// and the forced ones are attended to. Plain structures; kernels/params.h says what is computed.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "kernels/cuda/search_topk.h"
#include "kernels/cuda/sparse_policy.h"
#include "kernels/page.h"

namespace longspan::cuda {

// T rows, H query heads, G KV heads, D channels of keys and values. A block is a page of 64 tokens;
// entry e of the summaries stands for page e.
struct SparseDecodeArgs {
  SparseShape shape;
  // The search of each row: query, pages, candidate_begin, candidate_end and k as in a search
  // alone. Its results are written where scores and ids are not null.
  SearchTopkArgs search;

  // The attention, if shape.attends. Candidates may be forced blocks as well: such a block is
  // attended to once.
  const void* query = nullptr;          // [T][H][D] of shape.attention_query_dtype
  PagedView kv;                         // of the summaries' type, in an arena
  const int64_t* num_tokens = nullptr;  // [T] that a row sees, its own included
  float scale = 1.0F;
  float soft_cap = 0.0F;  // 0: none
  void* out = nullptr;    // [T][H][D] of out_dtype
  DataType out_dtype = DataType::kFloat32;
  float* lse = nullptr;  // [T][H], natural log
};

// The largest cluster, 16 blocks at most, of which the device has room for eight; 0 where it has
// no clusters. Asks the driver: call it once.
int sparse_max_cluster_size();

// The plan is plan_sparse_decode's for args.shape, and supported. Reads nothing before the kernels
// in front of it on the stream are complete, but may be launched while they run.
cudaError_t launch_sparse_decode(const SparseDecodeArgs& args,
                                 const SparsePlan& plan,
                                 cudaStream_t stream);

#ifdef LONGSPAN_CUDA_SPIN_LIMIT
// Waits for the device and prints the wait that gave up, if there was one.
void report_sparse_spin();
#endif

}  // namespace longspan::cuda
