// Moves the keys and values of a step's tasks from the lead to their owners and stores them: small
// ones with a broadcast that all ranks read from, large ones to the owners alone.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "base/status.h"
#include "worker/rank.h"

namespace longspan {

// Lives for one step. Use: `receive`, then `store`; every rank calls the same in the same order.
class TokenTransfer {
 public:
  TokenTransfer(Rank& rank, std::span<TaskState> tasks);

  // Bytes that the caller's own broadcast should carry for this transfer; 0 when the tokens go
  // separately or nowhere.
  size_t broadcast_bytes() const { return broadcast_bytes_; }
  // On the lead: the tokens, in the type of their caches.
  void pack_broadcast(std::byte* out) const;

  // `broadcast`: what the lead packed, if anything; must outlive the transfer.
  Status receive(const std::byte* broadcast);
  // Compares what is stored already, tells all ranks what differs (TaskState::mismatch), and
  // appends the rest of the tasks that agree. Summaries follow.
  Status store();

 private:
  // Where the rows of a task's segments come from on this rank.
  struct Source {
    TokenRows rows;
    int64_t first_token = 0;  // of `rows`; -1: rows are this rank's segments back to back
  };

  bool has_tokens(const TaskState& state) const { return state.task->has_tokens; }
  // The segments of a task that go to a rank: compared, then appended.
  std::vector<WriteSegment> segments(const TaskState& state, int rank) const;
  int64_t scattered_bytes(int rank) const;
  void pack_scattered(int rank, std::byte* out) const;
  Status scatter();
  TokenRows take(const TaskState& state, Source& source, const WriteSegment& segment) const;
  Status agree_on_mismatches();
  Status append(TaskState& state, Source& source, std::span<const WriteSegment> segments);

  Rank& rank_;
  std::span<TaskState> tasks_;
  size_t broadcast_bytes_ = 0;
  bool scattered_ = false;
  std::vector<Source> sources_;  // by task
};

}  // namespace longspan
