// Runs steps on one rank. The lead's caller drives its engine; the other ranks follow what comes
// over the host channel.
#pragma once

#include <span>
#include <vector>

#include "base/status.h"
#include "comm/communicator.h"
#include "worker/rank.h"
#include "worker/reduce.h"
#include "worker/step.h"

namespace longspan {

// What a step leaves on the lead.
struct StepOutcome {
  std::vector<TaskState> tasks;
  GroupReport report;
};

// Used by one thread, the rank's engine thread. Borrows its rank and the host channel.
class RankEngine {
 public:
  RankEngine(Rank& rank, Communicator& host) : rank_(rank), host_(host) {}

  // On the lead: tells the other ranks, then runs the step with them. `io` is as step.tasks.
  // Answers an error only when the group is broken, and breaks it for all then.
  StatusOr<StepOutcome> lead(const Step& step, std::span<TaskIo> io, Deadline deadline);
  // On the other ranks: runs steps until kStop or until the group breaks.
  Status follow();

 private:
  Status send_step(const Step& step);
  StatusOr<Step> receive_step();
  Status run(const Step& step, std::span<TaskIo> io, Deadline deadline, StepOutcome& outcome);
  Status run_tasks(const Step& step, std::span<TaskIo> io, Deadline deadline, StepOutcome& outcome);
  Status break_group(Status reason);

  Rank& rank_;
  Communicator& host_;
};

}  // namespace longspan
