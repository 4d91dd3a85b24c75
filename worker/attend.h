// The second half of the pipeline on one rank: spans from what was selected, and exact attention
// over this rank's part of them.
#pragma once

#include <vector>

#include "base/status.h"
#include "worker/portion.h"

namespace longspan {

// Spans of rows and selection heads, as AttendParams takes them, in this rank's tokens.
struct SpanLists {
  std::vector<int64_t> offsets{0};
  std::vector<Span> spans;

  // Ends the list of one (row, selection head): its spans are those added since the last call.
  void close(bool joined);
  void clear();
};

// What row `row`, selection head `head` attends to with a branch: its winners and the static spans
// in one list. Global tokens.
void append_selected_spans(const Portion& portion,
                           const BranchRun& run,
                           int64_t row,
                           int64_t head,
                           std::vector<Span>& spans);
// The tokens of the winner at `place`; empty where there is none. Global tokens.
Span winner_tokens(
    const Portion& portion, const BranchRun& run, int64_t row, int64_t head, int64_t place);

// Partial answers of every branch over tokens.
Status attend_to_tokens(Rank& rank, Round& round);

// Runs the backend over the rank's keys and values; `lists` has rows x num_selection_heads lists.
// out may be null.
struct TokenAttention {
  int64_t num_rows = 0;
  const int64_t* row_query = nullptr;  // [num_rows] or null
  int num_selection_heads = 1;
  const SpanLists* lists = nullptr;
  float* out = nullptr;
  float* lse = nullptr;
};
Status attend_spans(Rank& rank, const Portion& portion, const TokenAttention& attention);

}  // namespace longspan
