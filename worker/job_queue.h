// The lead's bounded queue: what runs next, and what runs together.
//
// Jobs of one layer of one context run in the order of their arrival, and a job of a whole context
// waits for the earlier ones of that context and holds back the later ones; everything else may
// overtake. Decodes that are ready run in one step. Decodes, prefill chunks and bulk writes take
// turns, so that none of them starves another.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "base/status.h"
#include "worker/group.h"

namespace longspan {

enum class JobKind : uint8_t { kDecode, kPrefill, kBulk, kControl };
inline constexpr int kWholeContext = -1;

// A piece of work for the engine thread, which either does it or refuses it, once.
class Job {
 public:
  Job() = default;
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;
  virtual ~Job() = default;

  JobKind kind = JobKind::kControl;
  ContextHandle context = 0;  // 0: of no context, ordered with nothing
  int layer = kWholeContext;
  Deadline deadline = Deadline::max();
  const std::atomic<bool>* cancelled = nullptr;  // may be null
  int64_t num_bytes = 0;
  std::chrono::steady_clock::time_point queued;

  // Expired, cancelled, or the lead has stopped.
  virtual void refuse(const Status& status) = 0;
};

struct JobQueueLimits {
  int max_jobs = 16384;
  int64_t max_bytes = int64_t{1} << 30;
  int max_step_items = 256;
};

class JobQueue {
 public:
  explicit JobQueue(const JobQueueLimits& limits) : limits_(limits) {}

  // All or none. RESOURCE_EXHAUSTED with reason QUEUE_FULL and a retry delay, UNAVAILABLE when
  // closed. The jobs are only taken with OK. Jobs that give something back (`always`) are never
  // refused for want of room.
  Status push(std::vector<std::unique_ptr<Job>>& jobs, bool always = false);

  // Waits for work: the jobs of the next step, or none once the queue is closed and empty. Called
  // by the engine thread.
  std::vector<std::unique_ptr<Job>> next();

  // Nothing more is taken; what is queued is still handed out.
  void close();

  int num_jobs(JobKind kind) const;

 private:
  using Jobs = std::list<std::unique_ptr<Job>>;

  // The jobs of the next step of this kind, in order of arrival; under the lock.
  std::vector<std::unique_ptr<Job>> take(JobKind kind);
  std::unique_ptr<Job> unlink(Jobs::iterator& position);

  const JobQueueLimits limits_;
  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable ready_;
  Jobs jobs_;  // in order of arrival
  std::array<int, 4> num_jobs_{};
  int64_t num_bytes_ = 0;
  size_t turn_ = 0;
  bool closed_ = false;
};

}  // namespace longspan
