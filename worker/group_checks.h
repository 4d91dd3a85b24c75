// What the lead checks before a step runs: arguments, positions and capacity, so that a step that
// started can only fail with its group.
#pragma once

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "kernels/backend.h"
#include "worker/rank.h"

namespace longspan {

// Completes the shape (layout.stripe_tokens 0 is chosen) or names what is wrong with it.
// UNIMPLEMENTED with the backend's reason.
Status check_shape(const Backend& backend, int num_ranks, ContextShape& shape);

// OUT_OF_RANGE where a context does not hold `num_tokens` tokens.
Status check_length(const ContextShard& shard, int64_t num_tokens);

// Positions and presence of what a task writes.
Status check_write(const ContextShard& shard, const Task& task, const TaskIo& io);

// An item of a call; sets the task's method.
Status check_item(const Backend& backend,
                  const ContextShard& shard,
                  const AttendItem& item,
                  Task& task);

// Takes the memory of an answer.
void prepare_result(const ContextShard& shard, const Task& task, AttendResult& result);

// How a task of a step that ran ended: ABORTED where tokens differ, DEADLINE_EXCEEDED.
Status task_status(const TaskState& state);

// Capacity on every rank, over the tasks of one step.
class Admission {
 public:
  Admission(std::vector<int64_t> used_bytes, int64_t capacity_bytes)
      : used_bytes_(std::move(used_bytes)), capacity_bytes_(capacity_bytes) {}

  // RESOURCE_EXHAUSTED, and nothing is counted, where a rank has no room for what the task appends.
  Status admit(const ContextShard& shard, const Task& task);

 private:
  std::vector<int64_t> used_bytes_;  // by rank
  int64_t capacity_bytes_;           // of a rank
};

}  // namespace longspan
