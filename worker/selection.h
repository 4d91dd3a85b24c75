// What a query row selects among, and the spans that follow: pure functions of a branch and a
// position, the same on every rank.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/method.h"
#include "kernels/params.h"
#include "worker/layout.h"

namespace longspan {

// Blocks of a row at `position`, whose own block is the last one. Forced are [0, forced_first) and
// [forced_last, own]; the candidates lie between. At most `k` candidates are kept.
struct BlockChoice {
  Span candidates;
  int64_t forced_first = 0;
  int64_t forced_last = 0;
  int64_t k = 0;
};
BlockChoice block_choice(const Branch& branch, Phase phase, int64_t position);

// Spans kept of a row that has `num_anchors` anchors.
int64_t span_budget(const Branch& branch, Phase phase, int64_t num_anchors);

// The tokens of block `block` that a row at `position` sees.
Span block_tokens(const Branch& branch, int64_t block, int64_t position);

// Appends what a row attends to whatever the search says: forced blocks, window, sinks, or all.
// Not in order, and spans may overlap.
void append_static_spans(const Branch& branch, int64_t position, std::vector<Span>& spans);

// Orders the spans from index `first` on, joins those that touch and drops empty ones.
void coalesce(std::vector<Span>& spans, size_t first = 0);

int64_t total_length(const std::vector<Span>& spans);

// The part of a global span that a rank holds, in its local tokens.
Span to_local(const Layout& layout, int rank, Span span);

// Joins the sorted candidate lists of `num_lists` ranks (list r at scores + r * list_stride, the
// same for ids; -1 ends a list) into the best `k` in total order: higher score, then lower id; a
// NaN score counts as -inf. Unused places of `out`: score -inf, id -1.
struct CandidateLists {
  int num_lists = 0;
  const float* const* scores = nullptr;  // [num_lists] of [k]
  const int64_t* const* ids = nullptr;   // [num_lists] of [k]
};
void merge_candidates(
    const CandidateLists& lists, int64_t capacity, int64_t k, float* out_scores, int64_t* out_ids);

}  // namespace longspan
