// What a method selected, for people: the spans of every row, head and branch, and on request how
// much of the dense attention they capture.
#pragma once

#include "base/status.h"
#include "worker/portion.h"

namespace longspan {

// On the lead: fills AttendResult::selections of the tasks that ask for them.
void report_selections(Rank& rank, Round& round);
// Every rank: attends densely and to every reported span, and the lead fills mass, recall and
// relative error. After reduce_round and report_selections.
Status compare_with_dense(Rank& rank, Round& round);

}  // namespace longspan
