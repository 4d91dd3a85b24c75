// Rank 0 of a group as the service sees it: orders the steps of all contexts on one engine thread.
//
// Every call is queued and answered through its callback, on the engine thread; callbacks must not
// block. A call whose deadline has passed, or whose caller is gone, never reaches the group. What
// the calls point to (tensors, methods) must live until the callback.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/functional/any_invocable.h"

#include "base/status.h"
#include "worker/call_codec.h"
#include "worker/group.h"
#include "worker/job_queue.h"
#include "worker/metrics.h"
#include "worker/open_context.h"

namespace longspan {

// What changes in a context's life.
struct ContextState {
  ContextRef context;
  uint64_t generation = 0;
  std::vector<int64_t> layer_lengths;
  // Of `describe` only.
  int64_t kv_bytes = 0;
  int64_t summary_bytes = 0;

  int64_t committed_length() const;  // the minimum over the layers
};

// How long a call may take, and whether anyone still waits for it.
struct CallTerms {
  Deadline deadline = Deadline::max();
  const std::atomic<bool>* cancelled = nullptr;
  uint64_t expected_generation = 0;  // 0: any
};

class Lead {
 public:
  using StateDone = absl::AnyInvocable<void(StatusOr<ContextState>)>;
  using StatusDone = absl::AnyInvocable<void(Status)>;
  using ListDone = absl::AnyInvocable<void(StatusOr<std::vector<ContextState>>)>;
  using AttendDone = absl::AnyInvocable<void(AttendResult result, uint64_t generation)>;
  // Names an append session; from `new_append_session`.
  using AppendSession = uint64_t;

  struct AttendCall {
    ContextRef context;
    AttendItem item;
    CallTerms terms;
    int64_t num_bytes = 0;
    AttendDone done;
  };

  Lead(std::unique_ptr<Group> group, const JobQueueLimits& limits, WorkerMetrics& metrics);
  ~Lead();
  Lead(const Lead&) = delete;
  Lead& operator=(const Lead&) = delete;

  // The context of that name, for decoding what comes for it; counts as a use. NOT_FOUND.
  StatusOr<ContextRef> find(const std::string& context_id) const;
  // Time since the last use; zero for an unknown context.
  std::chrono::nanoseconds idle_time(const std::string& context_id) const;

  // All are queued, or none is and no callback is called.
  Status attend(std::vector<AttendCall> calls);

  // An append session stages its writes; others see them after `commit`, all at once. A context has
  // one at a time (ABORTED otherwise). Each is ended by commit or roll_back.
  AppendSession new_append_session() { return next_session_.fetch_add(1); }
  void begin_append(const ContextRef& context,
                    AppendSession session,
                    CallTerms terms,
                    StatusDone done);
  void write(const ContextRef& context,
             AppendSession session,
             const DecodedWrite& write,
             CallTerms terms,
             StatusDone done);
  void commit(const ContextRef& context, AppendSession session, CallTerms terms, StateDone done);
  void roll_back(const ContextRef& context, AppendSession session, StatusDone done);

  void create(std::string context_id, ContextShape shape, size_t default_method, StateDone done);
  void fork(const ContextRef& parent,
            std::string child_id,
            int64_t num_tokens,
            CallTerms terms,
            StateDone done);
  void truncate(const ContextRef& context, int64_t num_tokens, CallTerms terms, StateDone done);
  // Brings the last state.
  void remove(const ContextRef& context, CallTerms terms, StateDone done);
  // The contexts of these names; unknown ones are left out.
  void describe(std::vector<std::string> context_ids, ListDone done);

  // Brings the metrics of memory and communication up to date.
  void refresh_usage();

  int queue_depth(JobKind kind) const { return queue_.num_jobs(kind); }

  // Takes nothing more; what is queued is still done.
  void drain() { queue_.close(); }
  // Drains and joins. Idempotent.
  void stop();
  // Ends the step that runs, so that a later `stop` is quick. From any thread.
  void interrupt();

 private:
  class AttendJob;
  class TaskJob;

  ContextRef look_up(const std::string& context_id) const;  // null: unknown

  struct Entry {
    ContextRef context;
    uint64_t generation = 1;
    std::vector<int64_t> layer_lengths;
    AppendSession append_session = 0;  // 0: none
  };

  void push_task(JobKind kind,
                 const ContextRef& context,
                 int layer,
                 const CallTerms& terms,
                 int64_t num_bytes,
                 bool always,
                 StatusDone task);
  void engine_loop();
  void run_step(const std::vector<AttendJob*>& jobs, Phase phase);
  Status admit(AttendJob& job);
  void finish_item(AttendJob& job, AttendResult result);

  StatusOr<Entry*> find_entry(const ContextRef& context, const CallTerms& terms);
  StatusOr<Entry*> find_session(const ContextRef& context, AppendSession session);
  StatusOr<ContextState> run_create(std::string context_id,
                                    ContextShape shape,
                                    size_t default_method);
  StatusOr<ContextState> run_fork(const ContextRef& parent,
                                  const std::string& child_id,
                                  int64_t num_tokens,
                                  const CallTerms& terms);
  StatusOr<ContextState> run_truncate(const ContextRef& context,
                                      int64_t num_tokens,
                                      const CallTerms& terms);
  Status run_begin_append(const ContextRef& context, AppendSession session, const CallTerms& terms);
  Status run_roll_back(const ContextRef& context, AppendSession session);
  StatusOr<ContextState> run_commit(const ContextRef& context, AppendSession session);
  Status run_write(const ContextRef& context, AppendSession session, const DecodedWrite& write);
  StatusOr<ContextState> run_remove(const ContextRef& context, const CallTerms& terms);
  ContextState add_entry(Entry entry);
  Status reload_lengths(Entry& entry);
  static ContextState state_of(const Entry& entry);

  std::unique_ptr<Group> group_;
  WorkerMetrics& metrics_;
  JobQueue queue_;
  std::atomic<AppendSession> next_session_{1};

  mutable std::mutex names_mutex_;
  std::unordered_map<std::string, ContextRef> names_;  // guarded by names_mutex_

  // Of the engine thread.
  std::unordered_map<ContextHandle, Entry> entries_;
  ContextHandle next_handle_ = 1;

  std::once_flag stopped_;
  std::thread engine_;
};

}  // namespace longspan
