#include "worker/group.h"

#include <atomic>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"

#include "comm/in_process.h"
#include "worker/group_checks.h"
#include "worker/rank_engine.h"

namespace longspan {
namespace {

constexpr int kMaxRanks = 64;

class InProcessGroup final : public Group {
 public:
  InProcessGroup(std::vector<std::unique_ptr<Communicator>> host,
                 std::vector<std::unique_ptr<Communicator>> data)
      : host_(std::move(host)), data_(std::move(data)) {}
  InProcessGroup(const InProcessGroup&) = delete;
  InProcessGroup& operator=(const InProcessGroup&) = delete;
  ~InProcessGroup() override { stop(); }

  Status start(const GroupOptions& options) {
    const int64_t capacity = options.kv_capacity_bytes / options.num_ranks;
    for (size_t i = 0; i < data_.size(); ++i) {
      LONGSPAN_ASSIGN_OR_RETURN(
          std::unique_ptr<Backend> backend,
          make_backend(options.backend, {.num_threads = options.threads_per_rank}));
      if (backend->memory() != BackendMemory::kHost) {
        return absl::UnimplementedError(absl::StrCat(
            "backend: ", options.backend, " works on device memory, a rank keeps host memory"));
      }
      ranks_.push_back(
          std::make_unique<Rank>(static_cast<int>(i), *data_[i], std::move(backend), capacity));
    }
    used_bytes_.assign(ranks_.size(), 0);
    lead_ = std::make_unique<RankEngine>(*ranks_[0], *host_[0]);
    for (size_t i = 1; i < ranks_.size(); ++i) {
      followers_.emplace_back([rank = ranks_[i].get(), host = host_[i].get()] {
        // An error broke the group: the lead meets it in its next operation and reports it.
        (void)RankEngine(*rank, *host).follow();
      });
    }
    return absl::OkStatus();
  }

  int num_ranks() const override { return static_cast<int>(ranks_.size()); }
  std::string backend_detail() const override { return ranks_[0]->backend->detail(); }

  Status create(ContextHandle context, const ContextShape& shape) override {
    if (store().find(context) != nullptr) {
      return absl::AlreadyExistsError(absl::StrCat("context ", context, " exists"));
    }
    Step step{.kind = StepKind::kCreate, .context = context, .shape = shape};
    LONGSPAN_RETURN_IF_ERROR(check_shape(*ranks_[0]->backend, num_ranks(), step.shape));
    return run(step);
  }

  Status remove(ContextHandle context) override {
    LONGSPAN_RETURN_IF_ERROR(find(context).status());
    return run({.kind = StepKind::kRemove, .context = context});
  }

  Status fork(ContextHandle parent, ContextHandle child, int64_t num_tokens) override {
    LONGSPAN_ASSIGN_OR_RETURN(ContextShard * shard, find(parent));
    if (store().find(child) != nullptr) {
      return absl::AlreadyExistsError(absl::StrCat("context ", child, " exists"));
    }
    LONGSPAN_RETURN_IF_ERROR(check_length(*shard, num_tokens));
    return run(
        {.kind = StepKind::kFork, .context = parent, .child = child, .num_tokens = num_tokens});
  }

  Status truncate(ContextHandle context, int64_t num_tokens) override {
    LONGSPAN_ASSIGN_OR_RETURN(ContextShard * shard, find(context));
    LONGSPAN_RETURN_IF_ERROR(check_length(*shard, num_tokens));
    return run({.kind = StepKind::kTruncate, .context = context, .num_tokens = num_tokens});
  }

  Status commit(ContextHandle context) override {
    LONGSPAN_RETURN_IF_ERROR(find(context).status());
    return run({.kind = StepKind::kCommit, .context = context});
  }

  Status rollback(ContextHandle context) override {
    LONGSPAN_RETURN_IF_ERROR(find(context).status());
    return run({.kind = StepKind::kRollback, .context = context});
  }

  Status write(ContextHandle context,
               int layer,
               int64_t start_pos,
               int64_t num_rows,
               TensorIn key,
               TensorIn value) override {
    LONGSPAN_ASSIGN_OR_RETURN(ContextShard * shard, find(context));
    TaskIo io;
    io.key = key;
    io.value = value;
    Step step{.kind = StepKind::kWrite};
    Task& task = step.tasks.emplace_back();
    task.context = context;
    task.layer = layer;
    task.start_pos = start_pos;
    task.num_rows = num_rows;
    task.has_tokens = true;
    LONGSPAN_RETURN_IF_ERROR(check_write(*shard, task, io));
    Admission admission(used_bytes_, store().pool().capacity_bytes());
    LONGSPAN_RETURN_IF_ERROR(admission.admit(*shard, task));
    LONGSPAN_ASSIGN_OR_RETURN(const StepOutcome outcome, run_step(step, {&io, 1}, never_));
    return task_status(outcome.tasks[0]);
  }

  std::vector<AttendResult> attend(std::span<const AttendItem> items, Deadline deadline) override;

  StatusOr<ContextUsage> usage(ContextHandle context) override {
    LONGSPAN_ASSIGN_OR_RETURN(ContextShard * shard, find(context));
    ContextUsage usage;
    for (const LayerShard& layer : shard->layers) {
      usage.layer_lengths.push_back(layer.visible);
      for (const ShardMap& map : shard->maps) {
        const ShardMap::Bytes bytes = map.held_bytes(layer.staged);
        usage.kv_bytes += bytes.tokens;
        usage.summary_bytes += bytes.summaries;
      }
    }
    return usage;
  }

  GroupUsage usage() override {
    GroupUsage usage;
    usage.rank_bytes = used_bytes_;
    usage.capacity_bytes = store().pool().capacity_bytes() * num_ranks();
    for (const auto* channel : {&host_, &data_}) {
      for (const auto& communicator : *channel) {
        usage.bytes_sent += communicator->bytes_sent();
        usage.bytes_received += communicator->bytes_received();
      }
    }
    return usage;
  }

  StageTimes last_step() const override { return last_step_; }

  void stop() override {
    const std::lock_guard lock(stop_mutex_);
    stopped_ = true;
    for (const auto* channel : {&host_, &data_}) {
      for (const auto& communicator : *channel) {
        communicator->abort(absl::UnavailableError("the group was stopped"));
      }
    }
    for (std::thread& follower : followers_) {
      if (follower.joinable()) {
        follower.join();
      }
    }
  }

 private:
  ShardStore& store() { return ranks_[0]->store; }

  StatusOr<ContextShard*> find(ContextHandle context) {
    ContextShard* shard = store().find(context);
    if (shard == nullptr) {
      return absl::NotFoundError(absl::StrCat("context ", context, " does not exist"));
    }
    return shard;
  }

  StatusOr<StepOutcome> run_step(const Step& step, std::span<TaskIo> io, Deadline deadline) {
    if (stopped_) {
      return absl::UnavailableError("the group was stopped");
    }
    if (!broken_.ok()) {
      return broken_;
    }
    StatusOr<StepOutcome> outcome = lead_->lead(step, io, deadline);
    if (!outcome.ok()) {
      broken_ =
          absl::UnavailableError(absl::StrCat("the group is broken: ", outcome.status().message()));
      return broken_;
    }
    used_bytes_ = outcome->report.used_bytes;
    return outcome;
  }

  Status run(const Step& step) { return run_step(step, {}, never_).status(); }

  // Tasks of the items that can run; the others have their status already.
  struct Batch {
    Step step{.kind = StepKind::kAttend};
    std::vector<TaskIo> io;
    std::vector<size_t> item;  // by task
  };
  Status admit(const AttendItem& item, Admission& admission, Batch& batch);

  const std::vector<std::unique_ptr<Communicator>> host_;
  const std::vector<std::unique_ptr<Communicator>> data_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::unique_ptr<RankEngine> lead_;
  std::atomic<bool> stopped_{false};
  std::mutex stop_mutex_;
  std::vector<std::thread> followers_;  // joined under stop_mutex_

  const Deadline never_ = Deadline::max();
  Status broken_;                    // the first failure, for every later call
  std::vector<int64_t> used_bytes_;  // by rank, after the last step
  StageTimes last_step_;
};

Status InProcessGroup::admit(const AttendItem& item, Admission& admission, Batch& batch) {
  LONGSPAN_ASSIGN_OR_RETURN(ContextShard * shard, find(item.context));
  Task task;
  task.context = item.context;
  task.layer = item.layer;
  task.start_pos = item.start_pos;
  task.num_rows = item.num_rows;
  task.has_tokens = item.key.data != nullptr || item.value.data != nullptr;
  task.show = true;
  task.phase = item.phase;
  task.return_selection = item.return_selection;
  task.compare_with_dense = item.compare_with_dense;
  for (const Task& other : batch.step.tasks) {
    if (other.context == task.context && other.layer == task.layer) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer: layer ", task.layer, " of a context is named twice in one call"));
    }
  }
  LONGSPAN_RETURN_IF_ERROR(check_item(*ranks_[0]->backend, *shard, item, task));
  LONGSPAN_RETURN_IF_ERROR(admission.admit(*shard, task));
  batch.step.tasks.push_back(std::move(task));
  batch.io.push_back({item.query, item.key, item.value, item.gates, item.search_query, nullptr});
  return absl::OkStatus();
}

// The keys that the rows of a finished item could see, over query heads.
int64_t visible_tokens(const Task& task, int num_query_heads) {
  const int64_t first = task.start_pos + 1;
  const int64_t last = task.start_pos + task.num_rows;
  return (first + last) * task.num_rows / 2 * num_query_heads;
}

std::vector<AttendResult> InProcessGroup::attend(std::span<const AttendItem> items,
                                                 Deadline deadline) {
  std::vector<AttendResult> results(items.size());
  Batch batch;
  Admission admission(used_bytes_, store().pool().capacity_bytes());
  const bool is_late = std::chrono::steady_clock::now() >= deadline;
  for (size_t i = 0; i < items.size(); ++i) {
    results[i].status = is_late ? absl::DeadlineExceededError("the deadline passed before the step")
                                : admit(items[i], admission, batch);
    if (results[i].status.ok()) {
      batch.item.push_back(i);
    }
  }
  for (size_t i = 0; i < batch.item.size(); ++i) {
    AttendResult& result = results[batch.item[i]];
    const Task& task = batch.step.tasks[i];
    batch.io[i].result = &result;
    prepare_result(*store().find(task.context), task, result);
  }
  if (batch.item.empty()) {
    return results;
  }
  const StatusOr<StepOutcome> outcome = run_step(batch.step, batch.io, deadline);
  for (size_t i = 0; i < batch.item.size(); ++i) {
    AttendResult& result = results[batch.item[i]];
    result.status = outcome.ok() ? task_status(outcome->tasks[i]) : outcome.status();
    if (!result.status.ok()) {
      Status failure = std::move(result.status);
      result = {};
      result.status = std::move(failure);
      continue;
    }
    const TaskState& state = outcome->tasks[i];
    result.layer_length = state.layer().visible;
    result.visible_tokens = visible_tokens(*state.task, state.shard->shape.num_query_heads);
  }
  if (outcome.ok()) {
    const RankReport& slowest = outcome->report.slowest;
    last_step_ = {slowest.scatter_seconds,
                  slowest.select_seconds,
                  slowest.compute_seconds,
                  slowest.reduce_seconds};
  }
  return results;
}

}  // namespace

StatusOr<std::unique_ptr<Group>> Group::start_in_process(const GroupOptions& options) {
  if (options.num_ranks < 1 || options.num_ranks > kMaxRanks) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_ranks: must be between 1 and ", kMaxRanks, ", got ", options.num_ranks));
  }
  if (options.kv_capacity_bytes < 0) {
    return absl::InvalidArgumentError("kv_capacity_bytes: must not be negative");
  }
  LONGSPAN_ASSIGN_OR_RETURN(auto host, make_in_process_group(options.num_ranks));
  LONGSPAN_ASSIGN_OR_RETURN(auto data, make_in_process_group(options.num_ranks));
  auto group = std::make_unique<InProcessGroup>(std::move(host), std::move(data));
  LONGSPAN_RETURN_IF_ERROR(group->start(options));
  return group;
}

}  // namespace longspan
