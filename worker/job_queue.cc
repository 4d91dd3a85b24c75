#include "worker/job_queue.h"

#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

#include "base/error_details.h"
#include "base/rpc.h"

namespace longspan {
namespace {

constexpr std::chrono::milliseconds kRetryDelay{50};

// Which jobs of a scan must wait for an earlier one.
class Waiting {
 public:
  bool must_wait(const Job& job) const {
    if (job.context == 0) {
      return false;
    }
    if (job.layer == kWholeContext) {
      return seen_.contains(job.context);
    }
    return closed_.contains(job.context) || layers_.contains({job.context, job.layer});
  }
  // Later jobs must not overtake this one, which is queued still or was taken in this scan.
  void pass(const Job& job) {
    if (job.context == 0) {
      return;
    }
    seen_.insert(job.context);
    if (job.layer == kWholeContext) {
      closed_.insert(job.context);
    } else {
      layers_.insert({job.context, job.layer});
    }
  }

 private:
  absl::flat_hash_set<ContextHandle> seen_;    // with any job passed
  absl::flat_hash_set<ContextHandle> closed_;  // with a whole-context job passed
  absl::flat_hash_set<std::pair<ContextHandle, int>> layers_;
};

// Control work is cheap and goes first in every round.
constexpr JobKind kTurns[] = {JobKind::kDecode, JobKind::kPrefill, JobKind::kBulk};

}  // namespace

Status JobQueue::push(std::vector<std::unique_ptr<Job>>& jobs, bool always) {
  const auto now = std::chrono::steady_clock::now();
  {
    const std::lock_guard lock(mutex_);
    if (closed_) {
      return draining_error();
    }
    int64_t bytes = num_bytes_;
    for (const auto& job : jobs) {
      bytes += job->num_bytes;
    }
    const auto count = static_cast<int64_t>(jobs_.size() + jobs.size());
    if (!always && (count > limits_.max_jobs || bytes > limits_.max_bytes)) {
      return with_retry(
          with_reason(absl::ResourceExhaustedError(absl::StrCat(
                          "the queue is full: ", jobs_.size(), " jobs, ", num_bytes_, " bytes")),
                      "QUEUE_FULL"),
          kRetryDelay);
    }
    num_bytes_ = bytes;
    for (auto& job : jobs) {
      job->queued = now;
      ++num_jobs_[static_cast<size_t>(job->kind)];
      jobs_.push_back(std::move(job));
    }
  }
  jobs.clear();
  ready_.notify_one();
  return absl::OkStatus();
}

std::vector<std::unique_ptr<Job>> JobQueue::next() {
  std::unique_lock lock(mutex_);
  ready_.wait(lock, [this] { return !jobs_.empty() || closed_; });
  if (auto control = take(JobKind::kControl); !control.empty()) {
    return control;
  }
  for (size_t i = 0; i < std::size(kTurns); ++i) {
    const JobKind kind = kTurns[turn_];
    turn_ = (turn_ + 1) % std::size(kTurns);
    if (auto jobs = take(kind); !jobs.empty()) {
      return jobs;
    }
  }
  return {};
}

void JobQueue::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  ready_.notify_all();
}

int JobQueue::num_jobs(JobKind kind) const {
  const std::lock_guard lock(mutex_);
  return num_jobs_[static_cast<size_t>(kind)];
}

std::vector<std::unique_ptr<Job>> JobQueue::take(JobKind kind) {
  std::vector<std::unique_ptr<Job>> taken;
  if (num_jobs_[static_cast<size_t>(kind)] == 0) {
    return taken;
  }
  const size_t most = kind == JobKind::kDecode ? static_cast<size_t>(limits_.max_step_items) : 1;
  Waiting waiting;
  for (auto position = jobs_.begin(); position != jobs_.end() && taken.size() < most;) {
    const Job& job = **position;
    const bool ready = job.kind == kind && !waiting.must_wait(job);
    waiting.pass(job);
    if (ready) {
      taken.push_back(unlink(position));
    } else {
      ++position;
    }
  }
  return taken;
}

std::unique_ptr<Job> JobQueue::unlink(Jobs::iterator& position) {
  std::unique_ptr<Job> job = std::move(*position);
  position = jobs_.erase(position);
  --num_jobs_[static_cast<size_t>(job->kind)];
  num_bytes_ -= job->num_bytes;
  return job;
}

}  // namespace longspan
