#include "worker/rank_engine.h"

#include <array>
#include <cstring>

#include "worker/context_attention.h"

namespace longspan {
namespace {

// A step goes out as one message of fixed size, which the steps of decoding fit in, and a second
// one with the rest where they do not.
constexpr size_t kFirstMessageBytes = 4096;
using FirstMessage = std::array<std::byte, kFirstMessageBytes>;

// Followers wait for the next step for as long as the group lives; stopping aborts the channel.
Deadline never() { return Deadline::max() - std::chrono::hours(24); }

}  // namespace

Status RankEngine::send_step(const Step& step) {
  if (rank_.size() == 1) {
    return absl::OkStatus();
  }
  std::vector<std::byte> message(sizeof(uint64_t));
  serialize(step, message);
  const uint64_t size = message.size();
  std::memcpy(message.data(), &size, sizeof size);
  message.resize(std::max(message.size(), kFirstMessageBytes));
  const std::span<std::byte> bytes(message);
  LONGSPAN_RETURN_IF_ERROR(
      host_.broadcast(bytes.first(kFirstMessageBytes), 0, Rank::exchange_deadline()));
  const std::span<std::byte> rest = bytes.subspan(kFirstMessageBytes);
  return rest.empty() ? absl::OkStatus() : host_.broadcast(rest, 0, Rank::exchange_deadline());
}

StatusOr<Step> RankEngine::receive_step() {
  FirstMessage first;
  LONGSPAN_RETURN_IF_ERROR(host_.broadcast(first, 0, never()));
  uint64_t size = 0;
  std::memcpy(&size, first.data(), sizeof size);
  std::vector<std::byte> message(first.begin(), first.end());
  if (size > first.size()) {
    message.resize(size);
    LONGSPAN_RETURN_IF_ERROR(
        host_.broadcast(std::span(message).subspan(first.size()), 0, Rank::exchange_deadline()));
  }
  if (size < sizeof size) {
    return absl::DataLossError("a step descriptor is damaged");
  }
  return parse_step(std::span(message).first(size).subspan(sizeof size));
}

Status RankEngine::break_group(Status reason) {
  rank_.data.abort(reason);
  host_.abort(reason);
  return reason;
}

StatusOr<StepOutcome> RankEngine::lead(const Step& step, std::span<TaskIo> io, Deadline deadline) {
  StepOutcome outcome;
  outcome.report.used_bytes.resize(static_cast<size_t>(rank_.size()));
  Status status = send_step(step);
  if (status.ok()) {
    status = run(step, io, deadline, outcome);
  }
  if (!status.ok()) {
    return break_group(std::move(status));
  }
  return outcome;
}

Status RankEngine::follow() {
  while (true) {
    StatusOr<Step> step = receive_step();
    if (!step.ok()) {
      return break_group(step.status());
    }
    if (step->kind == StepKind::kStop) {
      return absl::OkStatus();
    }
    StepOutcome outcome;
    if (Status status = run(*step, {}, {}, outcome); !status.ok()) {
      return break_group(std::move(status));
    }
  }
}

Status RankEngine::run(const Step& step,
                       std::span<TaskIo> io,
                       Deadline deadline,
                       StepOutcome& outcome) {
  if (step.kind == StepKind::kStop) {
    return absl::OkStatus();
  }
  if (step.kind == StepKind::kWrite || step.kind == StepKind::kAttend) {
    return run_tasks(step, io, deadline, outcome);
  }
  ContextShard* shard = rank_.store.find(step.context);
  LONGSPAN_CHECK((shard == nullptr) == (step.kind == StepKind::kCreate));
  switch (step.kind) {
    case StepKind::kCreate:
      rank_.store.create(step.context, step.shape);
      break;
    case StepKind::kRemove:
      rank_.store.remove(*shard);
      break;
    case StepKind::kFork:
      rank_.store.fork(*shard, step.child, step.num_tokens);
      break;
    case StepKind::kTruncate:
      rank_.store.truncate(*shard, step.num_tokens);
      break;
    case StepKind::kCommit:
      for (LayerShard& layer : shard->layers) {
        layer.visible = layer.staged;
      }
      break;
    case StepKind::kRollback:
      rank_.store.rollback(*shard);
      break;
    case StepKind::kWrite:
    case StepKind::kAttend:
    case StepKind::kStop:
      break;
  }
  RankReport report;
  return exchange_reports(rank_, report, rank_.is_lead() ? &outcome.report : nullptr);
}

Status RankEngine::run_tasks(const Step& step,
                             std::span<TaskIo> io,
                             Deadline deadline,
                             StepOutcome& outcome) {
  rank_.arena.reset();
  std::vector<TaskState>& tasks = outcome.tasks;
  for (size_t i = 0; i < step.tasks.size(); ++i) {
    const Task& task = step.tasks[i];
    TaskState& state = tasks.emplace_back();
    state.task = &task;
    state.shard = rank_.store.find(task.context);
    LONGSPAN_CHECK(state.shard != nullptr);
    state.io = rank_.is_lead() ? &io[i] : nullptr;
    state.visible_before = state.layer().visible;
    state.staged_before = state.layer().staged;
    if (step.kind == StepKind::kAttend) {
      const Method& method =
          task.method_index < 0
              ? task.method
              : state.shard->shape.methods[static_cast<size_t>(task.method_index)];
      state.method = &effective_method(method, task.layer, task.phase, state.end());
    }
  }
  RankReport report;
  GroupReport* reports = rank_.is_lead() ? &outcome.report : nullptr;
  if (step.kind == StepKind::kWrite) {
    LONGSPAN_RETURN_IF_ERROR(store_tokens(rank_, tasks));
    LONGSPAN_RETURN_IF_ERROR(exchange_reports(rank_, report, reports));
  } else {
    LONGSPAN_RETURN_IF_ERROR(attend_tasks(rank_, tasks, deadline, report, reports));
    if (rank_.is_lead()) {
      // Its own merging was not over when it reported.
      outcome.report.slowest.reduce_seconds =
          std::max(outcome.report.slowest.reduce_seconds, report.reduce_seconds);
    }
  }
  return absl::OkStatus();
}

}  // namespace longspan
