// The pipeline across ranks: the same code on every rank, over a step's tasks together, with one
// exchange a stage. It knows branches, summaries and merges, and no method by name.
//
//   inputs ──► store ──► summaries ─(normalisers)─► search ─(candidates)─► attend ─(partials)─►
//   merge
//
// In brackets what the ranks exchange. Rows are worked on in rounds, so that scratch memory is
// bounded.
#pragma once

#include <span>

#include "base/status.h"
#include "worker/rank.h"
#include "worker/reduce.h"

namespace longspan {

// Stores the rows of tasks that bring keys and values, and says through TaskState::mismatch which
// disagree with what is stored.
Status store_tokens(Rank& rank, std::span<TaskState> tasks);

// Answers the tasks; the lead fills their results. The lead looks at `deadline` between rounds:
// tasks that are not complete then are abandoned, and what they wrote is taken back.
Status attend_tasks(Rank& rank,
                    std::span<TaskState> tasks,
                    Deadline deadline,
                    RankReport& report,
                    GroupReport* reports);

}  // namespace longspan
