// What runs next, and what runs together.
#include "worker/job_queue.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error_details.h"

namespace longspan {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class NamedJob final : public Job {
 public:
  NamedJob(std::string job_name, JobKind job_kind, ContextHandle job_context, int job_layer)
      : name(std::move(job_name)) {
    kind = job_kind;
    context = job_context;
    layer = job_layer;
  }
  void refuse(const Status&) override {}
  std::string name;
};

class JobQueueTest : public testing::Test {
 protected:
  Status push(const std::string& name,
              JobKind kind,
              ContextHandle context,
              int layer = kWholeContext,
              int64_t num_bytes = 0,
              bool always = false) {
    std::vector<std::unique_ptr<Job>> jobs;
    jobs.push_back(std::make_unique<NamedJob>(name, kind, context, layer));
    jobs.back()->num_bytes = num_bytes;
    return queue_.push(jobs, always);
  }
  // Names of the jobs of the next step; only when there is work.
  std::vector<std::string> next() {
    std::vector<std::string> names;
    for (const auto& job : queue_.next()) {
      names.push_back(static_cast<const NamedJob&>(*job).name);
    }
    return names;
  }
  static constexpr JobKind kDecode = JobKind::kDecode;
  static constexpr JobKind kPrefill = JobKind::kPrefill;
  static constexpr JobKind kBulk = JobKind::kBulk;
  static constexpr JobKind kControl = JobKind::kControl;

  JobQueue queue_{{.max_jobs = 6, .max_bytes = 100, .max_step_items = 3}};
};

TEST_F(JobQueueTest, DecodesOfDifferentLayersAndContextsShareAStep) {
  ASSERT_TRUE(push("a0", kDecode, 1, 0).ok());
  ASSERT_TRUE(push("a1", kDecode, 1, 1).ok());
  ASSERT_TRUE(push("a0 again", kDecode, 1, 0).ok());
  ASSERT_TRUE(push("b0", kDecode, 2, 0).ok());
  ASSERT_TRUE(push("c0", kDecode, 3, 0).ok());
  EXPECT_THAT(next(), ElementsAre("a0", "a1", "b0")) << "three items at most, none twice";
  EXPECT_THAT(next(), ElementsAre("a0 again", "c0"));
}

TEST_F(JobQueueTest, KindsTakeTurns) {
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(push("decode", kDecode, 1, 0).ok());
    ASSERT_TRUE(push("prefill", kPrefill, 2, 0).ok());
    ASSERT_TRUE(push("bulk", kBulk, 3, 0).ok());
  }
  std::vector<std::string> order;
  order.reserve(6);
  for (int i = 0; i < 6; ++i) {
    order.push_back(next().front());
  }
  EXPECT_THAT(order, ElementsAre("decode", "prefill", "bulk", "decode", "prefill", "bulk"));
}

TEST_F(JobQueueTest, AWholeContextIsABarrierForItselfOnly) {
  ASSERT_TRUE(push("a0", kDecode, 1, 0).ok());
  ASSERT_TRUE(push("truncate a", kControl, 1).ok());
  ASSERT_TRUE(push("a0 after", kDecode, 1, 0).ok());
  ASSERT_TRUE(push("b0", kDecode, 2, 0).ok());
  ASSERT_TRUE(push("create", kControl, 0).ok());
  EXPECT_THAT(next(), ElementsAre("create"));
  EXPECT_THAT(next(), ElementsAre("a0", "b0"));
  EXPECT_THAT(next(), ElementsAre("truncate a"));
  EXPECT_THAT(next(), ElementsAre("a0 after"));
}

TEST_F(JobQueueTest, IsBoundedInJobsAndBytesAndAllOrNone) {
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(push("x", kDecode, 1, 0).ok());
  }
  std::vector<std::unique_ptr<Job>> two;
  two.push_back(std::make_unique<NamedJob>("y", kDecode, 2, 0));
  two.push_back(std::make_unique<NamedJob>("z", kDecode, 3, 0));
  const Status full = queue_.push(two);
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_EQ(reason_of(full), "QUEUE_FULL");
  EXPECT_EQ(two.size(), 2U);
  EXPECT_EQ(queue_.num_jobs(kDecode), 5);
  EXPECT_TRUE(push("gives back", kControl, 9, kWholeContext, 0, true).ok());
  EXPECT_TRUE(push("gives back too", kControl, 9, kWholeContext, 0, true).ok());
  while (queue_.num_jobs(kDecode) > 0) {
    next();
  }
  EXPECT_TRUE(absl::IsResourceExhausted(push("large", kBulk, 1, 0, 101)));
  EXPECT_TRUE(push("fits", kBulk, 1, 0, 100).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(push("one byte more", kBulk, 1, 0, 1)));
  next();
  EXPECT_TRUE(push("fits again", kBulk, 1, 0, 100).ok());
}

TEST_F(JobQueueTest, ClosingKeepsWhatIsQueued) {
  ASSERT_TRUE(push("a0", kDecode, 1, 0).ok());
  queue_.close();
  EXPECT_TRUE(absl::IsUnavailable(push("late", kDecode, 1, 0)));
  EXPECT_THAT(next(), ElementsAre("a0"));
  EXPECT_THAT(next(), IsEmpty());
}

TEST_F(JobQueueTest, ClosingWakesTheEngine) {
  std::thread engine([this] { EXPECT_TRUE(queue_.next().empty()); });
  queue_.close();
  engine.join();
}

// Random traffic: everything comes out once, layers in order, barriers held.
TEST(JobQueueProperties, OrderWithinALayerAndAroundBarriers) {
  const char* given = std::getenv("LONGSPAN_TEST_SEED");
  const unsigned seed =
      given != nullptr ? static_cast<unsigned>(std::atoi(given)) : std::random_device()();
  std::printf("LONGSPAN_TEST_SEED=%u\n", seed);
  std::mt19937 random(seed);
  JobQueue queue({.max_jobs = 1'000'000, .max_step_items = 5});
  struct Seen {
    int64_t last_barrier = -1;  // the last whole-context job that came out
    std::map<int, int64_t> last_of_layer;
  };
  std::map<ContextHandle, Seen> seen;
  std::map<ContextHandle, std::vector<int64_t>> queued;
  constexpr int64_t kJobs = 5000;
  int64_t pushed = 0;
  int64_t taken = 0;
  while (taken < kJobs) {
    for (int burst = static_cast<int>(random() % 40); burst > 0 && pushed < kJobs; --burst) {
      const auto kind = static_cast<JobKind>(random() % 4);
      const int layer = kind == JobKind::kControl ? kWholeContext : static_cast<int>(random() % 3);
      const ContextHandle context = 1 + random() % 4;
      std::vector<std::unique_ptr<Job>> jobs;
      jobs.push_back(std::make_unique<NamedJob>(std::to_string(pushed), kind, context, layer));
      ASSERT_TRUE(queue.push(jobs).ok());
      queued[context].push_back(pushed++);
    }
    if (taken == pushed) {
      continue;
    }
    for (const auto& job : queue.next()) {
      const int64_t number = std::stoll(static_cast<const NamedJob&>(*job).name);
      std::vector<int64_t>& waiting = queued[job->context];
      const auto place = std::find(waiting.begin(), waiting.end(), number);
      ASSERT_NE(place, waiting.end()) << "taken twice";
      Seen& context = seen[job->context];
      if (job->layer == kWholeContext) {
        ASSERT_EQ(place, waiting.begin()) << "it overtook a job of its context";
        context.last_barrier = number;
      } else {
        const auto last = context.last_of_layer.find(job->layer);
        ASSERT_TRUE(last == context.last_of_layer.end() || last->second < number);
        context.last_of_layer[job->layer] = number;
        ASSERT_GT(number, context.last_barrier);
      }
      waiting.erase(place);
      ++taken;
    }
  }
}

}  // namespace
}  // namespace longspan
