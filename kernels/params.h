// The problems that a backend solves: one plain struct a stage, shapes beside every pointer. No
// ownership, no policy.
//
// A shard is described in local coordinates: the tokens that a rank owns, in global order, numbered
// from 0. Ownership is monotone, so what a query may see is always a prefix of the local tokens,
// and a global span is a local span. The letters: T query rows, H query heads, G KV heads, D key
// size, E value size, B block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/data_type.h"
#include "kernels/method.h"
#include "kernels/page.h"

namespace longspan {

// out entry (first_out + i), i in [0, num_entries): the summary of tokens [s, s + spec.span()) with
// s = (first_entry + i) * spec.stride(), in positions of `tokens`. The pages of `out` are written.
// Every backend keeps the same bits: fp32, in token order from 0, then rounded to out.dtype. Means
// are the sum times 1 / length; weights go in by fused multiply-add; an extreme is replaced only by
// an element strictly beyond it.
struct SummarizeParams {
  const SummarySpec* spec = nullptr;
  PagedView tokens;
  int64_t first_entry = 0;
  int64_t num_entries = 0;
  PagedView out;
  int64_t first_out = 0;
};

// Scores candidates and keeps the best of each row, in one call.
struct SearchParams {
  const SearchSpec* spec = nullptr;
  const float* query = nullptr;  // [T][H][D]: the attention query or the supplied search query
  int64_t num_rows = 0;          // T
  int num_query_heads = 0;       // H
  float scale = 1.0F;            // of logits, for kSoftmax alone; raw scores are not scaled
  float soft_cap = 0.0F;         // for kSoftmax alone

  // Summary view: the entries of the shard. Anchor view: its keys.
  PagedView view;

  // Candidates of row t. Either the blocks [candidate_begin[t], candidate_end[t]) (local block
  // ids), or, for anchors, the entries candidates[candidate_offsets[t] .. candidate_offsets[t +
  // 1]), ascending local tokens.
  const int64_t* candidate_begin = nullptr;    // [T]
  const int64_t* candidate_end = nullptr;      // [T]
  const int64_t* candidates = nullptr;         // anchors
  const int64_t* candidate_offsets = nullptr;  // [T + 1], anchors

  // kSoftmax (NSA importance), where a block is summed over the windows that overlap it:
  const SummarySpec* summary = nullptr;
  int block_tokens = 0;                      // of the selection
  const int64_t* visible_entries = nullptr;  // [T]: local windows [0, n) end at or before the query
  const float* lse = nullptr;                // [T][H]: over all visible windows of all ranks
  // Windows that start before a stripe of this shard and reach into it, (window/stride - 1) a
  // stripe, in order; null pages where the whole context is one stripe. Window m of stripe s is
  // entry s * (window/stride - 1) + m. The first stripe of the context has no windows before it:
  // its entries are never read.
  PagedView halo;
  int64_t stripe_tokens = 0;  // local tokens in a stripe; 0: one stripe
  // Whether local token 0 is token 0 of the context (then stripe 0 has no windows before it).
  bool starts_context = true;

  // At most k[t] of row t are kept, k[t] <= max_k.
  const int64_t* k = nullptr;  // [T]
  int64_t max_k = 0;

  // Ordered by higher fp32 score, then lower id; a NaN counts as -inf, in each head before
  // head_reduce and after it. kSoftmax sums the windows of a block first, then reduces heads.
  // S = num_selection_heads(spec, H, G). Unused places: id -1, score -inf.
  float* scores = nullptr;  // [T][S][max_k]
  int64_t* ids = nullptr;  // [T][S][max_k]: local block id, or index of the local token for anchors
};

// Exact attention of each row over its spans. A row without keys, or with logits of -inf only, has
// out = 0 and lse = -inf; a NaN among the logits makes out and lse NaN.
struct AttendParams {
  // [num_queries][H][D], of query_dtype behind the pointer. CPU backends take fp32 alone, for the
  // query and the output.
  const float* query = nullptr;
  DataType query_dtype = DataType::kFloat32;
  const int64_t* row_query = nullptr;  // [T] index of the row's query; null: the row's own number
  int64_t num_rows = 0;                // T
  int num_query_heads = 0;             // H
  PagedView kv;

  // Row t, selection head s (S = 1, G or H of them; head h uses s = h * S / H):
  // spans[offsets[t*S+s] .. offsets[t*S+s+1]), ascending, disjoint, inside [0, kv.num_entries).
  int num_selection_heads = 1;
  const int64_t* span_offsets = nullptr;  // [T * S + 1]
  const Span* spans = nullptr;

  float scale = 1.0F;
  float soft_cap = 0.0F;  // 0: none; otherwise logit = cap * tanh(logit / cap)

  float* out = nullptr;  // [T][H][E], of out_dtype behind the pointer; null: only lse is wanted
  DataType out_dtype = DataType::kFloat32;
  float* lse = nullptr;  // [T][H], natural log
};

// Joins partial results of the same rows. Without weights by log-sum-exp:
//   m = max lse_p, w_p = exp(lse_p - m), out = sum w_p out_p / sum w_p, lse = m + log(sum w_p);
// with weights as a plain sum: out = sum weights[p] out_p (parts whose lse is -inf are zero), lse
// is not written.
struct MergeParams {
  int num_parts = 0;
  const float* const* part_out = nullptr;  // [num_parts] of [num_rows][E]
  const float* const* part_lse = nullptr;  // [num_parts] of [num_rows]; unused with weights
  const float* const* weights = nullptr;   // [num_parts] of [num_rows], or null
  const float* sink_logits = nullptr;  // [num_rows] or null: one more part with out = 0, lse = sink
  int64_t num_rows = 0;                // rows times heads
  int value_dim = 0;
  float* out = nullptr;  // [num_rows][E]; may be part_out[0]
  float* lse = nullptr;  // [num_rows]; may be part_lse[0]
};

}  // namespace longspan
