// A portion: the rows of one task that are worked on together, and what the stages of the pipeline
// leave for one another.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/method.h"
#include "worker/rank.h"

namespace longspan {

// One branch of a portion. R rows, S selection heads, K places for winners.
struct BranchRun {
  const Branch* branch = nullptr;
  int num_selection_heads = 1;  // S
  int64_t max_k = 0;            // K: the most that any row keeps
  const int64_t* k = nullptr;   // [R]
  // Of this rank first, of all ranks after the exchange: blocks or anchors, global, best first.
  // Unused places: id -1, score -inf.
  float* scores = nullptr;  // [R][S][K]
  int64_t* ids = nullptr;   // [R][S][K]
};

// Attention over the summaries, which compressed branches answer with and softmax scores are
// normalised by.
struct SummaryRun {
  int summary = 0;                           // place in ShardMap::summaries()
  bool is_normaliser = false;                // of a search: every rank needs the lse of all
  const int64_t* visible_entries = nullptr;  // [R] local
  float* out = nullptr;                      // [R][H][E], where a branch answers with it
  float* lse = nullptr;                      // [R][H], this rank's
  float* global_lse = nullptr;               // [R][H], of all ranks, where it is a normaliser
};

struct Portion {
  TaskState* state = nullptr;
  int64_t first_row = 0;  // of the task
  int64_t num_rows = 0;   // R

  const float* query = nullptr;         // [R][H][D]
  const float* search_query = nullptr;  // [R][H][D] or null
  const float* gates = nullptr;         // [R][H][branches] or null

  std::vector<BranchRun> branches;
  std::vector<SummaryRun> summaries;

  // Partial answers of this rank, to be merged with the other ranks' of the same part: one a
  // branch; for spans the static mask, then one a place for a winner.
  int64_t num_parts = 0;
  float* out = nullptr;  // [parts][R][H][E]
  float* lse = nullptr;  // [parts][R][H]
  // Keys that this rank attended to, summed over rows and query heads.
  int64_t selected_tokens = 0;

  const ContextShard& shard() const { return *state->shard; }
  const ContextShape& shape() const { return state->shard->shape; }
  const Method& method() const { return *state->method; }
  int64_t position(int64_t row) const { return state->task->start_pos + first_row + row; }
  size_t row_heads() const {
    return static_cast<size_t>(num_rows) * static_cast<size_t>(shape().num_query_heads);
  }
  size_t out_size() const { return row_heads() * static_cast<size_t>(shape().value_dim); }
  SummaryRun* find_summary(int summary);
};

using Round = std::vector<Portion>;

// Cuts the rows of all tasks into rounds whose scratch memory is bounded. Pure: every rank plans
// alike.
std::vector<Round> plan_rounds(std::span<TaskState> tasks, int num_ranks);

// Numbers of the call that every rank needs: queries, and where the method takes them search
// queries and gates, as one run of floats a portion.
size_t input_floats(const Portion& portion);
// On the lead: fills them from the caller's tensors.
void pack_inputs(const Portion& portion, float* out);
void set_inputs(Portion& portion, const float* inputs);

}  // namespace longspan
