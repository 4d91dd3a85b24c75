#include "worker/lead.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/error_details.h"

namespace longspan {
namespace {

Status unknown_context(const std::string& context_id) {
  return with_reason(absl::NotFoundError(absl::StrCat("there is no context \"", context_id, "\"")),
                     "CONTEXT_NOT_FOUND",
                     {{"context_id", context_id}});
}

Status append_in_progress() {
  constexpr std::chrono::milliseconds kRetryDelay{100};
  return with_retry(with_reason(absl::AbortedError("an Append of the context is in progress"),
                                "APPEND_IN_PROGRESS"),
                    kRetryDelay);
}

Status position_error(const std::string& message, int64_t expected_pos) {
  return with_reason(
      absl::OutOfRangeError(message), "POSITION", {{"expected_pos", absl::StrCat(expected_pos)}});
}

Status too_long(const OpenContext& context) {
  const std::string limit = absl::StrCat("max_tokens = ", context.shape().max_tokens);
  return with_quota(with_reason(absl::ResourceExhaustedError(
                                    absl::StrCat("the context would grow beyond its ", limit)),
                                "QUOTA"),
                    absl::StrCat("contexts/", context.id()),
                    limit);
}

Status refusal(const Job& job, std::chrono::steady_clock::time_point now) {
  if (job.cancelled != nullptr && job.cancelled->load(std::memory_order_relaxed)) {
    return absl::CancelledError("the caller is gone");
  }
  return job.deadline < now ? absl::DeadlineExceededError("the deadline passed in the queue")
                            : absl::OkStatus();
}

bool is_attend(const Job& job) {
  return job.kind == JobKind::kDecode || job.kind == JobKind::kPrefill;
}

}  // namespace

int64_t ContextState::committed_length() const {
  return layer_lengths.empty() ? 0 : *std::min_element(layer_lengths.begin(), layer_lengths.end());
}

class Lead::AttendJob final : public Job {
 public:
  explicit AttendJob(AttendCall attend_call) : call(std::move(attend_call)) {
    kind = call.item.phase == Phase::kDecode ? JobKind::kDecode : JobKind::kPrefill;
    context = call.item.context;
    layer = call.item.layer;
    deadline = call.terms.deadline;
    cancelled = call.terms.cancelled;
    num_bytes = call.num_bytes;
  }
  void refuse(const Status& status) override {
    AttendResult result;
    result.status = status;
    call.done(std::move(result), 0);
  }

  AttendCall call;
};

class Lead::TaskJob final : public Job {
 public:
  // The task is called with OK to run, or with the reason why it does not.
  explicit TaskJob(StatusDone task) : task_(std::move(task)) {}
  void run() { task_(absl::OkStatus()); }
  void refuse(const Status& status) override { task_(status); }

 private:
  StatusDone task_;
};

Lead::Lead(std::unique_ptr<Group> group, const JobQueueLimits& limits, WorkerMetrics& metrics)
    : group_(std::move(group)), metrics_(metrics), queue_(limits) {
  engine_ = std::thread([this] { engine_loop(); });
}

Lead::~Lead() { stop(); }

void Lead::stop() {
  std::call_once(stopped_, [this] {
    drain();
    engine_.join();
    group_->stop();
  });
}

void Lead::interrupt() { group_->stop(); }

ContextRef Lead::look_up(const std::string& context_id) const {
  const std::lock_guard lock(names_mutex_);
  const auto found = names_.find(context_id);
  return found == names_.end() ? nullptr : found->second;
}

StatusOr<ContextRef> Lead::find(const std::string& context_id) const {
  ContextRef context = look_up(context_id);
  if (context == nullptr) {
    return unknown_context(context_id);
  }
  context->touch();
  return context;
}

std::chrono::nanoseconds Lead::idle_time(const std::string& context_id) const {
  const ContextRef context = look_up(context_id);
  return context == nullptr ? std::chrono::nanoseconds::zero()
                            : std::chrono::steady_clock::now() - context->last_used();
}

Status Lead::attend(std::vector<AttendCall> calls) {
  std::vector<std::unique_ptr<Job>> jobs;
  jobs.reserve(calls.size());
  for (AttendCall& call : calls) {
    jobs.push_back(std::make_unique<AttendJob>(std::move(call)));
  }
  return queue_.push(jobs);
}

void Lead::push_task(JobKind kind,
                     const ContextRef& context,
                     int layer,
                     const CallTerms& terms,
                     int64_t num_bytes,
                     bool always,
                     StatusDone task) {
  auto job = std::make_unique<TaskJob>(std::move(task));
  job->kind = kind;
  job->context = context == nullptr ? 0 : context->handle();
  job->layer = layer;
  job->deadline = terms.deadline;
  job->cancelled = terms.cancelled;
  job->num_bytes = num_bytes;
  std::vector<std::unique_ptr<Job>> jobs;
  jobs.push_back(std::move(job));
  if (const Status status = queue_.push(jobs, always); !status.ok()) {
    jobs.front()->refuse(status);
  }
}

void Lead::begin_append(const ContextRef& context,
                        AppendSession session,
                        CallTerms terms,
                        StatusDone done) {
  auto task =
      [this, context, session, terms, done = std::move(done)](const Status& status) mutable {
        done(status.ok() ? run_begin_append(context, session, terms) : status);
      };
  push_task(JobKind::kControl, context, kWholeContext, terms, 0, false, std::move(task));
}

void Lead::write(const ContextRef& context,
                 AppendSession session,
                 const DecodedWrite& write,
                 CallTerms terms,
                 StatusDone done) {
  const auto& shape = context->shape();
  const int64_t num_bytes = write.num_rows * shape.num_kv_heads *
                            (shape.key_dim + shape.value_dim) *
                            static_cast<int64_t>(size_of(write.key.dtype));
  auto task =
      [this, context, session, write, done = std::move(done)](const Status& status) mutable {
        done(status.ok() ? run_write(context, session, write) : status);
      };
  push_task(JobKind::kBulk, context, write.layer, terms, num_bytes, false, std::move(task));
}

void Lead::commit(const ContextRef& context,
                  AppendSession session,
                  CallTerms terms,
                  StateDone done) {
  auto task = [this, context, session, done = std::move(done)](const Status& status) mutable {
    if (status.ok()) {
      done(run_commit(context, session));
    } else {
      done(status);
    }
  };
  push_task(JobKind::kControl, context, kWholeContext, terms, 0, false, std::move(task));
}

void Lead::roll_back(const ContextRef& context, AppendSession session, StatusDone done) {
  auto task = [this, context, session, done = std::move(done)](const Status& status) mutable {
    done(status.ok() ? run_roll_back(context, session) : status);
  };
  push_task(JobKind::kControl, context, kWholeContext, {}, 0, true, std::move(task));
}

void Lead::create(std::string context_id,
                  ContextShape shape,
                  size_t default_method,
                  StateDone done) {
  auto task = [this,
               context_id = std::move(context_id),
               shape = std::move(shape),
               default_method,
               done = std::move(done)](const Status& status) mutable {
    if (status.ok()) {
      done(run_create(std::move(context_id), std::move(shape), default_method));
    } else {
      done(status);
    }
  };
  push_task(JobKind::kControl, nullptr, kWholeContext, {}, 0, false, std::move(task));
}

void Lead::fork(const ContextRef& parent,
                std::string child_id,
                int64_t num_tokens,
                CallTerms terms,
                StateDone done) {
  auto task =
      [this, parent, child_id = std::move(child_id), num_tokens, terms, done = std::move(done)](
          const Status& status) mutable {
        if (status.ok()) {
          done(run_fork(parent, child_id, num_tokens, terms));
        } else {
          done(status);
        }
      };
  push_task(JobKind::kControl, parent, kWholeContext, terms, 0, false, std::move(task));
}

void Lead::truncate(const ContextRef& context,
                    int64_t num_tokens,
                    CallTerms terms,
                    StateDone done) {
  auto task =
      [this, context, num_tokens, terms, done = std::move(done)](const Status& status) mutable {
        if (status.ok()) {
          done(run_truncate(context, num_tokens, terms));
        } else {
          done(status);
        }
      };
  push_task(JobKind::kControl, context, kWholeContext, terms, 0, false, std::move(task));
}

void Lead::remove(const ContextRef& context, CallTerms terms, StateDone done) {
  auto task = [this, context, terms, done = std::move(done)](const Status& status) mutable {
    if (status.ok()) {
      done(run_remove(context, terms));
    } else {
      done(status);
    }
  };
  push_task(JobKind::kControl, context, kWholeContext, terms, 0, true, std::move(task));
}

void Lead::describe(std::vector<std::string> context_ids, ListDone done) {
  auto task = [this, context_ids = std::move(context_ids), done = std::move(done)](
                  const Status& status) mutable {
    if (!status.ok()) {
      done(status);
      return;
    }
    std::vector<ContextState> states;
    for (const std::string& id : context_ids) {
      const ContextRef context = look_up(id);
      if (context == nullptr) {
        continue;
      }
      ContextState state = state_of(entries_.at(context->handle()));
      const StatusOr<ContextUsage> usage = group_->usage(context->handle());
      if (!usage.ok()) {
        done(usage.status());
        return;
      }
      state.kv_bytes = usage->kv_bytes;
      state.summary_bytes = usage->summary_bytes;
      states.push_back(std::move(state));
    }
    done(std::move(states));
  };
  push_task(JobKind::kControl, nullptr, kWholeContext, {}, 0, false, std::move(task));
}

void Lead::refresh_usage() {
  push_task(JobKind::kControl, nullptr, kWholeContext, {}, 0, false, [this](const Status& status) {
    if (status.ok()) {
      metrics_.set_usage(group_->usage());
    }
  });
}

void Lead::engine_loop() {
  while (true) {
    std::vector<std::unique_ptr<Job>> jobs = queue_.next();
    if (jobs.empty()) {
      return;
    }
    const auto now = std::chrono::steady_clock::now();
    std::vector<AttendJob*> step;
    for (const auto& job : jobs) {
      metrics_.queued(now - job->queued);
      if (const Status status = refusal(*job, now); !status.ok()) {
        job->refuse(status);
      } else if (is_attend(*job)) {
        step.push_back(static_cast<AttendJob*>(job.get()));
      } else {
        static_cast<TaskJob*>(job.get())->run();
      }
    }
    if (!step.empty()) {
      run_step(step, step.front()->call.item.phase);
    }
  }
}

void Lead::run_step(const std::vector<AttendJob*>& jobs, Phase phase) {
  std::vector<AttendItem> items;
  std::vector<AttendJob*> admitted;
  Deadline deadline = Deadline::min();
  for (AttendJob* job : jobs) {
    if (const Status status = admit(*job); !status.ok()) {
      job->refuse(status);
      continue;
    }
    items.push_back(job->call.item);
    admitted.push_back(job);
    // The latest: an item in a hurry must not end the step of its neighbours.
    deadline = std::max(deadline, job->deadline);
  }
  if (admitted.empty()) {
    return;
  }
  std::vector<AttendResult> results = group_->attend(items, deadline);
  metrics_.step(phase, group_->last_step());
  for (size_t i = 0; i < admitted.size(); ++i) {
    finish_item(*admitted[i], std::move(results[i]));
  }
}

Status Lead::admit(AttendJob& job) {
  AttendItem& item = job.call.item;
  LONGSPAN_ASSIGN_OR_RETURN(Entry * entry, find_entry(job.call.context, job.call.terms));
  const int64_t length = entry->layer_lengths[static_cast<size_t>(item.layer)];
  if (item.start_pos == kLastRows) {
    if (length < item.num_rows) {
      return position_error(absl::StrCat("layer ", item.layer, " holds only ", length, " tokens"),
                            length);
    }
    item.start_pos = length - item.num_rows;
  }
  const bool writes = item.key.data != nullptr;
  const int64_t end = item.start_pos + item.num_rows;
  if (writes && entry->append_session != 0) {
    return append_in_progress();
  }
  if (writes ? item.start_pos > length : end > length) {
    return position_error(absl::StrCat("layer ",
                                       item.layer,
                                       " holds ",
                                       length,
                                       " tokens, the rows are [",
                                       item.start_pos,
                                       ", ",
                                       end,
                                       ")"),
                          length);
  }
  if (end > job.call.context->shape().max_tokens) {
    return too_long(*job.call.context);
  }
  return absl::OkStatus();
}

void Lead::finish_item(AttendJob& job, AttendResult result) {
  const AttendItem& item = job.call.item;
  Entry& entry = entries_.at(item.context);
  if (item.key.data != nullptr) {
    const auto layer = static_cast<size_t>(item.layer);
    const int64_t before = entry.layer_lengths[layer];
    if (result.status.ok()) {
      entry.layer_lengths[layer] = result.layer_length;
    } else if (const Status status = reload_lengths(entry); !status.ok()) {
      result.status = status;
    }
    // Read anew: reloading replaces the lengths.
    const int64_t after = entry.layer_lengths[layer];
    if (after != before) {
      ++entry.generation;
      metrics_.appended(after - before);
    }
  }
  if (result.status.ok()) {
    metrics_.attended(item, result);
  }
  job.call.context->touch();
  job.call.done(std::move(result), entry.generation);
}

StatusOr<Lead::Entry*> Lead::find_entry(const ContextRef& context, const CallTerms& terms) {
  const auto found = entries_.find(context->handle());
  if (found == entries_.end()) {
    return unknown_context(context->id());
  }
  Entry& entry = found->second;
  if (terms.expected_generation != 0 && terms.expected_generation != entry.generation) {
    return with_reason(absl::AbortedError(absl::StrCat("the context is at generation ",
                                                       entry.generation,
                                                       ", not ",
                                                       terms.expected_generation)),
                       "STALE_GENERATION",
                       {{"generation", absl::StrCat(entry.generation)}});
  }
  return &entry;
}

StatusOr<Lead::Entry*> Lead::find_session(const ContextRef& context, AppendSession session) {
  LONGSPAN_ASSIGN_OR_RETURN(Entry * entry, find_entry(context, {}));
  if (entry->append_session != session) {
    return absl::AbortedError("the Append has ended");
  }
  return entry;
}

StatusOr<ContextState> Lead::run_create(std::string context_id,
                                        ContextShape shape,
                                        size_t default_method) {
  if (look_up(context_id) != nullptr) {
    return absl::AlreadyExistsError(
        absl::StrCat("there is a context \"", context_id, "\" already"));
  }
  const ContextHandle handle = next_handle_++;
  Entry entry;
  entry.layer_lengths.assign(static_cast<size_t>(shape.num_layers), 0);
  entry.context = std::make_shared<const OpenContext>(
      std::move(context_id), handle, std::move(shape), default_method);
  LONGSPAN_RETURN_IF_ERROR(group_->create(handle, entry.context->shape()));
  return add_entry(std::move(entry));
}

StatusOr<ContextState> Lead::run_fork(const ContextRef& parent,
                                      const std::string& child_id,
                                      int64_t num_tokens,
                                      const CallTerms& terms) {
  LONGSPAN_ASSIGN_OR_RETURN(Entry * entry, find_entry(parent, terms));
  const int64_t committed = state_of(*entry).committed_length();
  if (num_tokens > committed) {
    return position_error(absl::StrCat("num_tokens: the context holds ", committed, " tokens"),
                          committed);
  }
  if (look_up(child_id) != nullptr) {
    return absl::AlreadyExistsError(absl::StrCat("there is a context \"", child_id, "\" already"));
  }
  const ContextHandle handle = next_handle_++;
  LONGSPAN_RETURN_IF_ERROR(group_->fork(parent->handle(), handle, num_tokens));
  Entry child;
  child.context = std::make_shared<const OpenContext>(
      child_id, handle, parent->shape(), parent->default_method());
  child.layer_lengths.assign(entry->layer_lengths.size(), num_tokens);
  return add_entry(std::move(child));
}

StatusOr<ContextState> Lead::run_truncate(const ContextRef& context,
                                          int64_t num_tokens,
                                          const CallTerms& terms) {
  LONGSPAN_ASSIGN_OR_RETURN(Entry * entry, find_entry(context, terms));
  const int64_t committed = state_of(*entry).committed_length();
  if (num_tokens > committed) {
    return position_error(absl::StrCat("num_tokens: the context holds ", committed, " tokens"),
                          committed);
  }
  if (entry->append_session != 0) {
    return append_in_progress();
  }
  LONGSPAN_RETURN_IF_ERROR(group_->truncate(context->handle(), num_tokens));
  std::vector<int64_t> lengths(entry->layer_lengths.size(), num_tokens);
  if (lengths != entry->layer_lengths) {
    entry->layer_lengths = std::move(lengths);
    ++entry->generation;
  }
  return state_of(*entry);
}

Status Lead::run_begin_append(const ContextRef& context,
                              AppendSession session,
                              const CallTerms& terms) {
  LONGSPAN_ASSIGN_OR_RETURN(Entry * entry, find_entry(context, terms));
  if (entry->append_session != 0) {
    return append_in_progress();
  }
  entry->append_session = session;
  return absl::OkStatus();
}

Status Lead::run_roll_back(const ContextRef& context, AppendSession session) {
  LONGSPAN_ASSIGN_OR_RETURN(Entry * entry, find_session(context, session));
  entry->append_session = 0;
  return group_->rollback(context->handle());
}

StatusOr<ContextState> Lead::run_commit(const ContextRef& context, AppendSession session) {
  LONGSPAN_ASSIGN_OR_RETURN(Entry * entry, find_session(context, session));
  LONGSPAN_RETURN_IF_ERROR(group_->commit(context->handle()));
  entry->append_session = 0;
  const std::vector<int64_t> before = entry->layer_lengths;
  LONGSPAN_RETURN_IF_ERROR(reload_lengths(*entry));
  if (entry->layer_lengths != before) {
    ++entry->generation;
  }
  for (size_t layer = 0; layer < before.size(); ++layer) {
    metrics_.appended(entry->layer_lengths[layer] - before[layer]);
  }
  return state_of(*entry);
}

Status Lead::run_write(const ContextRef& context,
                       AppendSession session,
                       const DecodedWrite& write) {
  LONGSPAN_RETURN_IF_ERROR(find_session(context, session).status());
  if (write.start_pos + write.num_rows > context->shape().max_tokens) {
    return too_long(*context);
  }
  context->touch();
  return group_->write(
      context->handle(), write.layer, write.start_pos, write.num_rows, write.key, write.value);
}

StatusOr<ContextState> Lead::run_remove(const ContextRef& context, const CallTerms& terms) {
  LONGSPAN_ASSIGN_OR_RETURN(Entry * entry, find_entry(context, terms));
  ContextState last = state_of(*entry);
  {
    const std::lock_guard lock(names_mutex_);
    names_.erase(context->id());
  }
  entries_.erase(context->handle());
  LONGSPAN_RETURN_IF_ERROR(group_->remove(context->handle()));
  return last;
}

ContextState Lead::add_entry(Entry entry) {
  ContextState state = state_of(entry);
  {
    const std::lock_guard lock(names_mutex_);
    names_[entry.context->id()] = entry.context;
  }
  entries_.emplace(entry.context->handle(), std::move(entry));
  return state;
}

Status Lead::reload_lengths(Entry& entry) {
  LONGSPAN_ASSIGN_OR_RETURN(ContextUsage usage, group_->usage(entry.context->handle()));
  entry.layer_lengths = std::move(usage.layer_lengths);
  return absl::OkStatus();
}

ContextState Lead::state_of(const Entry& entry) {
  return {.context = entry.context,
          .generation = entry.generation,
          .layer_lengths = entry.layer_lengths};
}

}  // namespace longspan
