// The lead on its own: a group that counts and can be held up shows what reaches it, and in which
// steps. The real group is tested beside it, and behind real gRPC.
#include "worker/lead.h"

#include <atomic>
#include <condition_variable>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error_details.h"

namespace longspan {
namespace {

using testing::ElementsAre;
using testing::SizeIs;

// Keeps lengths, records steps. `hold` keeps the next steps from finishing until `release`.
class CountingGroup final : public Group {
 public:
  int num_ranks() const override { return 1; }
  std::string backend_detail() const override { return "counting"; }
  Status create(ContextHandle context, const ContextShape& shape) override {
    lengths_[context].assign(static_cast<size_t>(shape.num_layers), 0);
    return create_status;
  }
  Status remove(ContextHandle context) override {
    lengths_.erase(context);
    return absl::OkStatus();
  }
  Status fork(ContextHandle parent, ContextHandle child, int64_t num_tokens) override {
    lengths_[child].assign(lengths_.at(parent).size(), num_tokens);
    return absl::OkStatus();
  }
  Status truncate(ContextHandle context, int64_t num_tokens) override {
    lengths_.at(context).assign(lengths_.at(context).size(), num_tokens);
    return absl::OkStatus();
  }
  Status write(ContextHandle, int layer, int64_t, int64_t num_rows, TensorIn, TensorIn) override {
    staged_[layer] += num_rows;
    return absl::OkStatus();
  }
  Status commit(ContextHandle context) override {
    for (const auto& [layer, rows] : std::exchange(staged_, {})) {
      lengths_.at(context)[static_cast<size_t>(layer)] += rows;
    }
    return absl::OkStatus();
  }
  Status rollback(ContextHandle) override {
    staged_.clear();
    ++num_rollbacks;
    return absl::OkStatus();
  }
  std::vector<AttendResult> attend(std::span<const AttendItem> items, Deadline deadline) override {
    std::vector<AttendResult> results;
    std::vector<int64_t> positions;
    for (const AttendItem& item : items) {
      AttendResult& result = results.emplace_back();
      int64_t& length = lengths_.at(item.context)[static_cast<size_t>(item.layer)];
      result.status = item_status;
      if (item.key.data != nullptr && item_status.ok()) {
        length = std::max(length, item.start_pos + item.num_rows);
      }
      result.layer_length = length;
      positions.push_back(item.start_pos);
    }
    std::unique_lock lock(mutex_);
    steps_.push_back(std::move(positions));
    deadlines.push_back(deadline);
    changed_.notify_all();
    changed_.wait(lock, [this] { return !held_; });
    return results;
  }
  StatusOr<ContextUsage> usage(ContextHandle context) override {
    return ContextUsage{.layer_lengths = lengths_.at(context)};
  }
  GroupUsage usage() override { return {}; }
  StageTimes last_step() const override { return {}; }
  void stop() override { release(); }

  void hold() {
    const std::lock_guard lock(mutex_);
    held_ = true;
  }
  void release() {
    const std::lock_guard lock(mutex_);
    held_ = false;
    changed_.notify_all();
  }
  void wait_for_step(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return steps_.size() >= count; });
  }
  // Start positions of the items, step by step.
  std::vector<std::vector<int64_t>> steps() {
    const std::lock_guard lock(mutex_);
    return steps_;
  }

  Status create_status;
  Status item_status;
  std::vector<Deadline> deadlines;
  int num_rollbacks = 0;

 private:
  std::map<ContextHandle, std::vector<int64_t>> lengths_;
  std::map<int, int64_t> staged_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::vector<int64_t>> steps_;
  bool held_ = false;
};

class LeadTest : public testing::Test {
 protected:
  LeadTest() {
    auto group = std::make_unique<CountingGroup>();
    group_ = group.get();
    lead_ = std::make_unique<Lead>(std::move(group), JobQueueLimits{}, metrics_);
  }
  void TearDown() override { group_->release(); }

  ContextRef create(const std::string& id, int num_layers = 2) {
    ContextShape shape;
    shape.num_layers = num_layers;
    shape.num_query_heads = 1;
    shape.num_kv_heads = 1;
    shape.key_dim = 64;
    shape.value_dim = 64;
    shape.methods = {dense_method()};
    shape.max_tokens = 1000;
    std::promise<StatusOr<ContextState>> made;
    lead_->create(
        id, shape, 0, [&](StatusOr<ContextState> state) { made.set_value(std::move(state)); });
    return (*made.get_future().get()).context;
  }

  struct Answer {
    Status status;
    uint64_t generation = 0;
  };
  using Future = std::future<Answer>;

  // Rows at `start_pos`; `writes`: with keys and values.
  Future attend(const ContextRef& context,
                int layer,
                int64_t start_pos,
                bool writes,
                CallTerms terms = {},
                int64_t num_rows = 1,
                Phase phase = Phase::kDecode) {
    auto answer = std::make_shared<std::promise<Answer>>();
    Lead::AttendCall call;
    call.context = context;
    call.item.context = context->handle();
    call.item.layer = layer;
    call.item.phase = phase;
    call.item.start_pos = start_pos;
    call.item.num_rows = num_rows;
    call.item.query = {DataType::kFloat32, row_.data()};
    if (writes) {
      call.item.key = call.item.query;
      call.item.value = call.item.query;
    }
    call.item.method = &context->shape().methods.front();
    call.terms = terms;
    call.done = [answer](const AttendResult& result, uint64_t generation) {
      answer->set_value({result.status, generation});
    };
    std::vector<Lead::AttendCall> calls;
    calls.push_back(std::move(call));
    Future future = answer->get_future();
    if (const Status status = lead_->attend(std::move(calls)); !status.ok()) {
      std::promise<Answer> refused;
      refused.set_value({status, 0});
      return refused.get_future();
    }
    return future;
  }

  Status wait(const std::function<void(Lead::StatusDone)>& start) {
    std::promise<Status> done;
    start([&](Status status) { done.set_value(std::move(status)); });
    return done.get_future().get();
  }
  StatusOr<ContextState> wait_state(const std::function<void(Lead::StateDone)>& start) {
    std::promise<StatusOr<ContextState>> done;
    start([&](StatusOr<ContextState> state) { done.set_value(std::move(state)); });
    return done.get_future().get();
  }

  void fill(const ContextRef& context, int64_t num_tokens) {
    for (int layer = 0; layer < context->shape().num_layers; ++layer) {
      ASSERT_TRUE(attend(context, layer, 0, true, {}, num_tokens).get().status.ok());
    }
  }

  // Occupies the engine; what is queued now waits.
  Future block(const ContextRef& context) {
    const size_t before = group_->steps().size();
    group_->hold();
    Future blocking = attend(context, 0, kLastRows, false);
    group_->wait_for_step(before + 1);
    return blocking;
  }

  std::vector<float> row_ = std::vector<float>(64 * 1000, 1.0F);
  prometheus::Registry registry_;
  WorkerMetrics metrics_{registry_, {"dense"}};
  CountingGroup* group_ = nullptr;
  std::unique_ptr<Lead> lead_;
};

TEST_F(LeadTest, WhatIsReadyTogetherRunsTogether) {
  const ContextRef a = create("a");
  const ContextRef b = create("b");
  fill(a, 10);
  fill(b, 20);
  Future blocking = block(a);
  const size_t before = group_->steps().size();
  std::vector<Future> queued;
  queued.push_back(attend(a, 1, kLastRows, false));
  queued.push_back(attend(b, 0, kLastRows, false));
  queued.push_back(attend(b, 1, 20, true));
  queued.push_back(attend(b, 1, 21, true));
  group_->release();
  for (Future& future : queued) {
    EXPECT_TRUE(future.get().status.ok());
  }
  const auto steps = group_->steps();
  ASSERT_THAT(steps, SizeIs(before + 2));
  EXPECT_THAT(steps[before], ElementsAre(9, 19, 20));
  EXPECT_THAT(steps[before + 1], ElementsAre(21));
}

TEST_F(LeadTest, PrefillAndDecodeTakeTurns) {
  const ContextRef a = create("a");
  fill(a, 10);
  Future blocking = block(a);
  const size_t before = group_->steps().size();
  std::vector<Future> queued;
  for (int64_t i = 0; i < 2; ++i) {
    queued.push_back(attend(a, 0, 3 * i, false, {}, 2, Phase::kPrefill));
  }
  for (int64_t i = 0; i < 2; ++i) {
    queued.push_back(attend(a, 1, 5 + i, false));
  }
  group_->release();
  for (Future& future : queued) {
    EXPECT_TRUE(future.get().status.ok());
  }
  const auto steps = group_->steps();
  ASSERT_THAT(steps, SizeIs(before + 4));
  EXPECT_THAT(steps[before], ElementsAre(0));
  EXPECT_THAT(steps[before + 1], ElementsAre(5));
  EXPECT_THAT(steps[before + 2], ElementsAre(3));
  EXPECT_THAT(steps[before + 3], ElementsAre(6));
}

TEST_F(LeadTest, ExpiredAndCancelledWorkNeverReachesTheGroup) {
  const ContextRef a = create("a");
  fill(a, 10);
  Future blocking = block(a);
  const size_t before = group_->steps().size();
  const std::atomic<bool> cancelled = true;
  Future expired = attend(a, 0, 10, true, {.deadline = std::chrono::steady_clock::now()});
  Future gone = attend(a, 1, 10, true, {.cancelled = &cancelled});
  group_->release();
  EXPECT_TRUE(absl::IsDeadlineExceeded(expired.get().status));
  EXPECT_TRUE(absl::IsCancelled(gone.get().status));
  EXPECT_TRUE(blocking.get().status.ok());
  EXPECT_THAT(group_->steps(), SizeIs(before));
}

TEST_F(LeadTest, AStepHasTheLatestDeadlineOfItsItems) {
  const ContextRef a = create("a");
  fill(a, 10);
  Future blocking = block(a);
  const Deadline near = std::chrono::steady_clock::now() + std::chrono::hours(1);
  const Deadline far = near + std::chrono::hours(1);
  Future first = attend(a, 0, kLastRows, false, {.deadline = near});
  Future second = attend(a, 1, kLastRows, false, {.deadline = far});
  group_->release();
  first.get();
  second.get();
  EXPECT_EQ(group_->deadlines.back(), far);
}

TEST_F(LeadTest, PositionsAreCheckedBeforeTheGroup) {
  const ContextRef a = create("a");
  fill(a, 10);
  const size_t before = group_->steps().size();
  EXPECT_TRUE(absl::IsOutOfRange(attend(a, 0, 11, true).get().status));
  EXPECT_TRUE(absl::IsOutOfRange(attend(a, 0, 10, false).get().status));
  EXPECT_TRUE(absl::IsOutOfRange(attend(a, 0, 9, false, {}, 2).get().status));
  EXPECT_TRUE(absl::IsOutOfRange(attend(a, 0, kLastRows, false, {}, 11).get().status));
  const Status full = attend(a, 0, 10, true, {}, 991).get().status;
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_EQ(reason_of(full), "QUOTA");
  EXPECT_THAT(group_->steps(), SizeIs(before));
  EXPECT_TRUE(attend(a, 0, 10, true, {}, 990).get().status.ok());
}

TEST_F(LeadTest, GenerationsCountChanges) {
  const ContextRef a = create("a");
  const uint64_t first = attend(a, 0, 0, true).get().generation;
  EXPECT_EQ(attend(a, 0, 0, true).get().generation, first) << "a replay changes nothing";
  EXPECT_EQ(attend(a, 0, kLastRows, false).get().generation, first);
  EXPECT_EQ(attend(a, 0, 1, true).get().generation, first + 1);
  EXPECT_TRUE(absl::IsAborted(attend(a, 0, 2, true, {.expected_generation = first}).get().status));
  EXPECT_TRUE(attend(a, 0, 2, true, {.expected_generation = first + 1}).get().status.ok());
}

TEST_F(LeadTest, AFailedWriteIsMeasuredAgain) {
  const ContextRef a = create("a");
  fill(a, 10);
  group_->item_status = absl::DeadlineExceededError("too slow");
  EXPECT_TRUE(absl::IsDeadlineExceeded(attend(a, 0, 10, true).get().status));
  group_->item_status = absl::OkStatus();
  EXPECT_TRUE(attend(a, 0, 10, true).get().status.ok());
}

TEST_F(LeadTest, AppendSessions) {
  const ContextRef a = create("a");
  const auto session = lead_->new_append_session();
  const auto other = lead_->new_append_session();
  const auto begin = [&](Lead::AppendSession which) {
    return wait([&](Lead::StatusDone done) { lead_->begin_append(a, which, {}, std::move(done)); });
  };
  const DecodedWrite write{.layer = 1,
                           .num_rows = 5,
                           .key = {DataType::kFloat32, row_.data()},
                           .value = {DataType::kFloat32, row_.data()}};
  const auto write_to = [&](Lead::AppendSession which) {
    return wait([&](Lead::StatusDone done) { lead_->write(a, which, write, {}, std::move(done)); });
  };
  ASSERT_TRUE(begin(session).ok());
  EXPECT_TRUE(absl::IsAborted(begin(other)));
  EXPECT_TRUE(absl::IsAborted(write_to(other)));
  ASSERT_TRUE(write_to(session).ok());
  EXPECT_TRUE(absl::IsAborted(attend(a, 0, 0, true).get().status));
  const auto truncated =
      wait_state([&](Lead::StateDone done) { lead_->truncate(a, 0, {}, std::move(done)); });
  EXPECT_EQ(reason_of(truncated.status()), "APPEND_IN_PROGRESS");
  const auto committed =
      wait_state([&](Lead::StateDone done) { lead_->commit(a, session, {}, std::move(done)); });
  ASSERT_TRUE(committed.ok());
  EXPECT_THAT(committed->layer_lengths, ElementsAre(0, 5));
  EXPECT_EQ(committed->committed_length(), 0);

  ASSERT_TRUE(begin(other).ok());
  ASSERT_TRUE(write_to(other).ok());
  ASSERT_TRUE(
      wait([&](Lead::StatusDone done) { lead_->roll_back(a, other, std::move(done)); }).ok());
  EXPECT_EQ(group_->num_rollbacks, 1);
  EXPECT_TRUE(absl::IsAborted(write_to(other))) << "the session is over";
  EXPECT_TRUE(attend(a, 1, 5, true).get().status.ok());
}

TEST_F(LeadTest, TheLifeOfContexts) {
  const ContextRef a = create("a");
  fill(a, 10);
  const auto forked =
      wait_state([&](Lead::StateDone done) { lead_->fork(a, "b", 4, {}, std::move(done)); });
  ASSERT_TRUE(forked.ok());
  EXPECT_THAT(forked->layer_lengths, ElementsAre(4, 4));
  EXPECT_TRUE(absl::IsOutOfRange(wait_state([&](Lead::StateDone done) {
                                   lead_->fork(a, "c", 11, {}, std::move(done));
                                 }).status()));
  EXPECT_TRUE(absl::IsAlreadyExists(wait_state([&](Lead::StateDone done) {
                                      lead_->fork(a, "b", 1, {}, std::move(done));
                                    }).status()));
  const auto removed =
      wait_state([&](Lead::StateDone done) { lead_->remove(a, {}, std::move(done)); });
  ASSERT_TRUE(removed.ok());
  EXPECT_EQ(removed->committed_length(), 10);
  EXPECT_TRUE(absl::IsNotFound(lead_->find("a").status()));
  EXPECT_TRUE(absl::IsNotFound(attend(a, 0, kLastRows, false).get().status))
      << "a reference from before its end";
  std::promise<StatusOr<std::vector<ContextState>>> described;
  lead_->describe({"a", "b"}, [&](StatusOr<std::vector<ContextState>> states) {
    described.set_value(std::move(states));
  });
  const auto states = described.get_future().get();
  ASSERT_TRUE(states.ok());
  ASSERT_THAT(*states, SizeIs(1));
  EXPECT_EQ(states->front().context->id(), "b");
}

TEST_F(LeadTest, AContextThatTheGroupRefusesIsNotThere) {
  group_->create_status = absl::UnimplementedError("no such heads");
  const auto made = wait_state(
      [&](Lead::StateDone done) { lead_->create("x", ContextShape(), 0, std::move(done)); });
  EXPECT_TRUE(absl::IsUnimplemented(made.status()));
  EXPECT_TRUE(absl::IsNotFound(lead_->find("x").status()));
}

TEST_F(LeadTest, StoppingFinishesWhatIsQueuedAndRefusesTheRest) {
  const ContextRef a = create("a");
  fill(a, 10);
  Future blocking = block(a);
  Future queued = attend(a, 1, kLastRows, false);
  lead_->drain();
  EXPECT_TRUE(absl::IsUnavailable(attend(a, 1, kLastRows, false).get().status));
  EXPECT_TRUE(absl::IsUnavailable(
      wait([&](Lead::StatusDone done) { lead_->roll_back(a, 1, std::move(done)); })));
  group_->release();
  lead_->stop();
  EXPECT_TRUE(blocking.get().status.ok());
  EXPECT_TRUE(queued.get().status.ok());
  lead_->stop();
}

TEST_F(LeadTest, UsesAreRemembered) {
  const ContextRef a = create("a");
  const auto before = a->last_used();
  EXPECT_GE(lead_->idle_time("a").count(), 0);
  EXPECT_EQ(a->last_used(), before) << "asking is not using";
  ASSERT_TRUE(lead_->find("a").ok());
  EXPECT_GT(a->last_used(), before);
  EXPECT_EQ(lead_->idle_time("nosuch").count(), 0);
}

}  // namespace
}  // namespace longspan
