// Launches of the portable kernels: plain structs in device memory, errors of the launch alone.
// They take every shape that supports() of the backend takes.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "kernels/cuda/policy.h"
#include "kernels/method.h"
#include "kernels/params.h"

namespace longspan::cuda {

// SummarizeParams with its spec resolved.
struct SummarizeArgs {
  PagedView tokens;
  PagedView out;
  int64_t first_entry = 0;
  int64_t num_entries = 0;
  int64_t first_out = 0;
  SummaryKind kind = SummaryKind::kMean;
  int64_t span = 0;                      // tokens of an entry
  int64_t stride = 0;                    // tokens from one entry to the next
  float mean_factor = 1.0F;              // 1 / span
  float length_factor = 1.0F;            // kMean: what the mean is multiplied by at last
  const float* key_weights = nullptr;    // [span], kCompressed; null: the mean
  const float* value_weights = nullptr;  // [span], kCompressed; null: the mean
};
cudaError_t launch_summarize(const SummarizeArgs& args, cudaStream_t stream);

struct AttendArgs {
  AttendParams params;
  // The tokens of each list are dealt to so many blocks; more than 1 leave partial results.
  int num_splits = 1;
  float* part_out = nullptr;  // [num_splits][T * H][E]; null with params.out
  float* part_lse = nullptr;  // [num_splits][T * H]
};
cudaError_t launch_attend(const AttendArgs& args, cudaStream_t stream);

cudaError_t launch_merge(const MergeParams& params, cudaStream_t stream);
// Parts in one array instead of one pointer each; joined by log-sum-exp.
struct MergePartsArgs {
  int num_parts = 0;
  const float* part_out = nullptr;  // [num_parts][num_rows][E]; null: only lse is wanted
  const float* part_lse = nullptr;  // [num_parts][num_rows]
  int64_t num_rows = 0;
  int value_dim = 0;
  void* out = nullptr;  // [num_rows][E] of out_dtype
  DataType out_dtype = DataType::kFloat32;
  float* lse = nullptr;  // [num_rows]
};
cudaError_t launch_merge_parts(const MergePartsArgs& args, cudaStream_t stream);

// A candidate as one number, larger for what comes first: its score's bits in an order that
// integers share, then the complement of its place among the candidates of its row. 0: none.
using CandidateKey = uint64_t;

// SearchParams with its specs resolved, and scratch memory.
struct SearchArgs {
  const float* query = nullptr;  // [T][H][D]
  int64_t num_rows = 0;          // T
  int num_query_heads = 0;       // H
  int num_lists = 0;             // S, of a row
  int num_score_heads = 0;       // of a row: H, or G after query_reduce
  QueryReduce query_reduce = QueryReduce::kNone;
  HeadReduce head_reduce = HeadReduce::kNone;
  bool anchors = false;
  bool bound = false;
  bool softmax = false;
  float scale = 1.0F;
  float soft_cap = 0.0F;
  PagedView view;
  const int64_t* candidate_begin = nullptr;    // [T], blocks
  const int64_t* candidate_end = nullptr;      // [T]
  const int64_t* candidates = nullptr;         // anchors
  const int64_t* candidate_offsets = nullptr;  // [T + 1], anchors
  int64_t window_tokens = 0;                   // of the summary, for softmax
  int64_t stride_tokens = 0;
  int64_t block_tokens = 0;
  const int64_t* visible_entries = nullptr;  // [T]
  const float* lse = nullptr;                // [T][H]
  PagedView halo;
  int64_t stripe_tokens = 0;
  bool starts_context = true;
  const int64_t* k = nullptr;  // [T]
  int64_t max_k = 0;
  float* scores = nullptr;  // [T][S][max_k]
  int64_t* ids = nullptr;   // [T][S][max_k]

  // The candidates of each list are dealt to so many blocks; more than 1 leave partial lists.
  int num_splits = 1;
  int64_t num_blocks = 0;          // of the grid, which strides over the T * S * num_splits items
  double* head_queries = nullptr;  // [num_blocks][heads of a list][D]
  CandidateKey* part_keys = nullptr;  // [T * S][num_splits][max_k], sorted
  CandidateKey* buffers = nullptr;    // [num_blocks][queue_capacity]; null: in shared memory
  int64_t queue_capacity = 0;         // a power of two, twice max_k at least
};
cudaError_t launch_search(const SearchArgs& args, cudaStream_t stream);

}  // namespace longspan::cuda
