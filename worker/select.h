// The first half of the pipeline: which blocks or anchors the rows of a round select. Every rank
// scores what it holds; afterwards every rank knows the winners of all.
#pragma once

#include "base/status.h"
#include "worker/portion.h"

namespace longspan {

// Counts what each row may keep and takes the memory of partial answers.
Status prepare_portions(Rank& rank, Round& round);
// Attends to the summaries that branches answer with or scores are normalised by, and exchanges the
// normalisers: NSA's ranking needs the log-sum-exp over the windows of all ranks.
Status attend_to_summaries(Rank& rank, Round& round);
// Scores own candidates, exchanges the best of each rank and keeps the best of all.
Status search_candidates(Rank& rank, Round& round);

}  // namespace longspan
