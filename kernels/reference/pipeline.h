// The whole pipeline on one rank, in double precision and without pages, shards or spans code: what
// every backend, layout and rank count must answer. Written to be read beside docs/methods.md and
// docs/numerics.md.
#pragma once

#include <cstdint>
#include <vector>

#include "base/data_type.h"
#include "kernels/method.h"
#include "kernels/params.h"

namespace longspan {

// One layer of one context and some query rows. All pointers are the caller's.
struct ReferenceProblem {
  const Method* method = nullptr;  // well-formed; roles are applied
  Phase phase = Phase::kDecode;
  int layer = 0;  // for method->dense_layers

  int num_query_heads = 0;                 // H
  int num_kv_heads = 0;                    // G
  int key_dim = 0;                         // D
  int value_dim = 0;                       // E
  DataType kv_dtype = DataType::kFloat32;  // what summaries are rounded to
  double scale = 1.0;
  double soft_cap = 0.0;               // 0: none
  const float* sink_logits = nullptr;  // [H] or null

  int64_t num_tokens = 0;         // n
  const float* keys = nullptr;    // [n][G][D], rounded to kv_dtype already
  const float* values = nullptr;  // [n][G][E], the same

  int64_t num_rows = 0;                 // T
  const int64_t* positions = nullptr;   // [T], each below n; row t sees tokens [0, positions[t]]
  const float* query = nullptr;         // [T][H][D]
  const float* search_query = nullptr;  // [T][H][D], for methods that need it
  const float* gates = nullptr;         // [T][H][branches], for methods that need them
};

// A selected block, or the span around a selected anchor.
struct ReferenceSelected {
  int64_t id = 0;  // block number, or position of the anchor
  Span tokens;     // global, cut at the query (blocks) or before the window (spans)
  bool forced = false;
  double score = 0;  // -inf for forced blocks, which are not scored
};

// What one branch of one query head attends to.
struct ReferenceSelection {
  // Blocks in ascending order; spans by falling score, then rising position of the anchor.
  std::vector<ReferenceSelected> selected;
  // Selection, window and sinks together: ascending, disjoint, not touching. Of spans, the union
  // over all of them. Empty for a branch over summaries.
  std::vector<Span> tokens;
  // Lowest score kept minus highest score refused, infinite when nothing was refused: a computation
  // in lower precision may select otherwise only where this is about its rounding error.
  double margin = 0;
};

struct ReferenceResult {
  std::vector<double> out;                     // [T][H][E]
  std::vector<double> lse;                     // [T][H]; empty when the method has none
  std::vector<ReferenceSelection> selections;  // [T][H][branches]
  int num_branches = 0;                        // of the effective method
};

ReferenceResult run_reference(const ReferenceProblem& problem);

}  // namespace longspan
