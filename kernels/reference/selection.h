// What a branch selects, in double precision: summaries over the plain arrays of a problem, scores,
// order, forced blocks, anchors and spans. The first half of the reference pipeline.
#pragma once

#include <vector>

#include "kernels/reference/pipeline.h"

namespace longspan::reference {

// Keys and values in one array each, of tokens or of summaries.
struct Entries {
  const float* keys = nullptr;    // [n][G][D]
  const float* values = nullptr;  // [n][G][E]
  int num_kv_heads = 0;
  int key_dim = 0;
  int value_dim = 0;

  const float* key(int64_t entry, int kv_head) const {
    return keys + (entry * num_kv_heads + kv_head) * key_dim;
  }
  const float* value(int64_t entry, int kv_head) const {
    return values + (entry * num_kv_heads + kv_head) * value_dim;
  }
};

// The summaries of a branch, owned: every entry that the tokens complete.
struct Summaries {
  std::vector<float> keys;
  std::vector<float> values;  // kMinMax: the maxima
  Entries entries;
};

Entries tokens_of(const ReferenceProblem& problem);
Summaries summarize_tokens(const ReferenceProblem& problem, const SummarySpec& spec);

// The logit of one query head at one key: scaled, then capped.
double logit(const ReferenceProblem& problem, const float* query, const float* key);

// The selection of every query head of one row, [H].
std::vector<ReferenceSelection> select(const ReferenceProblem& problem,
                                       const Branch& branch,
                                       const Summaries& summaries,
                                       int64_t row);

}  // namespace longspan::reference
