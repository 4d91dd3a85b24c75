// The coordinator against a worker that answers when, and what, the test says.
#include "coordinator/coordinator.h"

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <gtest/gtest.h>

#include "base/error_details.h"

namespace longspan {
namespace {

using std::chrono::seconds;

// Keeps what it is asked for until the test answers.
class FakeWorker final : public WorkerClient {
 public:
  v1::GetCapabilitiesResponse capabilities() const override { return {}; }
  v1::CheckSpecResponse check_spec(const v1::ContextSpec&) const override { return {}; }
  void create(const std::string& context_id,
              const v1::ContextSpec& spec,
              ContextDone done) override {
    keep(context_id, spec, std::move(done));
  }
  void describe(std::vector<std::string> context_ids, ContextsDone done) override {
    std::vector<v1::Context> found;
    for (const std::string& id : context_ids) {
      if (known.contains(id)) {
        found.push_back(known.at(id));
      }
    }
    done(std::move(found));
  }
  void fork(const v1::ForkContextRequest& request, ContextDone done) override {
    keep(request.new_context_id(), {}, std::move(done));
  }
  void truncate(const v1::TruncateContextRequest& request, ContextDone done) override {
    keep(request.context_id(), {}, std::move(done));
  }
  void remove(const v1::DeleteContextRequest& request, ContextDone done) override {
    keep(request.context_id(), {}, std::move(done));
  }
  std::chrono::nanoseconds idle_time(const std::string&) const override { return idle; }

  void succeed() {
    v1::Context context;
    context.set_context_id(asked_id);
    *context.mutable_spec() = asked_spec;
    context.set_generation(1);
    known[asked_id] = context;
    std::exchange(pending, ContextDone())(context);
  }
  void fail(const Status& status) { std::exchange(pending, ContextDone())(status); }

  std::map<std::string, v1::Context> known;
  std::chrono::nanoseconds idle{0};
  std::string asked_id;
  v1::ContextSpec asked_spec;
  ContextDone pending;

 private:
  void keep(const std::string& id, const v1::ContextSpec& spec, ContextDone done) {
    asked_id = id;
    asked_spec = spec;
    pending = std::move(done);
  }
};

class CoordinatorTest : public testing::Test {
 protected:
  void create(const std::string& id, int64_t ttl_seconds = 0) {
    v1::CreateContextRequest request;
    request.set_context_id(id);
    request.mutable_spec()->set_num_layers(1);
    if (ttl_seconds > 0) {
      request.mutable_spec()->mutable_ttl()->set_seconds(ttl_seconds);
    }
    answer_.reset();
    coordinator_.create(request,
                        [this](StatusOr<v1::Context> context) { answer_ = std::move(context); });
  }
  void get(const std::string& id) {
    answer_.reset();
    coordinator_.get(id, [this](StatusOr<v1::Context> context) { answer_ = std::move(context); });
  }
  void remove(const std::string& id, bool allow_missing = false) {
    v1::DeleteContextRequest request;
    request.set_context_id(id);
    request.set_allow_missing(allow_missing);
    removed_.reset();
    coordinator_.remove(request, [this](Status status) { removed_ = std::move(status); });
  }

  FakeWorker worker_;
  prometheus::Registry registry_;
  CoordinatorMetrics metrics_{registry_};
  Moment now_{SteadyTime(seconds(1000)), SystemTime(seconds(1'700'000'000))};
  Coordinator coordinator_{worker_, metrics_, 100, [this] { return now_; }};
  std::optional<StatusOr<v1::Context>> answer_;
  std::optional<Status> removed_;
};

TEST_F(CoordinatorTest, AContextIsThereOnceTheWorkerHasIt) {
  create("a");
  EXPECT_FALSE(answer_.has_value());
  get("a");
  EXPECT_TRUE(absl::IsNotFound(answer_->status()));
  create("a");
  EXPECT_TRUE(absl::IsUnavailable(answer_->status())) << "it is being created";
  worker_.succeed();
  get("a");
  ASSERT_TRUE(answer_->ok());
  EXPECT_EQ((*answer_)->create_time().seconds(), 1'700'000'000);
  EXPECT_EQ((*answer_)->spec().num_layers(), 1U);
}

TEST_F(CoordinatorTest, WhatTheWorkerRefusesIsForgotten) {
  create("a");
  worker_.fail(absl::UnimplementedError("not here"));
  EXPECT_TRUE(absl::IsUnimplemented(answer_->status()));
  create("a");
  worker_.succeed();
  EXPECT_TRUE(answer_->ok());
}

TEST_F(CoordinatorTest, RemovalThatFailsLeavesTheContext) {
  create("a");
  worker_.succeed();
  remove("a");
  get("a");
  EXPECT_TRUE(absl::IsNotFound(answer_->status())) << "nobody gets what is being removed";
  worker_.fail(absl::AbortedError("another generation"));
  EXPECT_TRUE(absl::IsAborted(*removed_));
  get("a");
  EXPECT_TRUE(answer_->ok());
  remove("a");
  worker_.succeed();
  EXPECT_TRUE(removed_->ok());
  remove("a");
  EXPECT_TRUE(absl::IsNotFound(*removed_));
  remove("a", true);
  EXPECT_TRUE(removed_->ok());
}

TEST_F(CoordinatorTest, LeasesExpireByTheClock) {
  create("leased", 10);
  worker_.succeed();
  EXPECT_EQ((*answer_)->expire_time().seconds(), 1'700'000'010);
  worker_.idle = seconds(9);
  now_.steady += seconds(9);
  coordinator_.expire();
  EXPECT_FALSE(worker_.pending);
  now_.steady += seconds(2);
  coordinator_.expire();
  EXPECT_FALSE(worker_.pending) << "it was used two seconds ago: uses renew";
  worker_.idle = seconds(11);
  coordinator_.expire();
  ASSERT_TRUE(worker_.pending);
  worker_.succeed();
  get("leased");
  EXPECT_TRUE(absl::IsNotFound(answer_->status()));
}

TEST_F(CoordinatorTest, KeepAliveRenews) {
  create("leased", 10);
  worker_.succeed();
  worker_.idle = seconds(3600);
  now_.steady += seconds(9);
  v1::KeepAliveRequest request;
  request.add_context_ids("leased");
  request.add_context_ids("nosuch");
  const v1::KeepAliveResponse response = coordinator_.keep_alive(request);
  EXPECT_EQ(response.leases(0).remaining().seconds(), 10);
  EXPECT_EQ(response.leases(1).status().code(), static_cast<int>(absl::StatusCode::kNotFound));
  now_.steady += seconds(9);
  coordinator_.expire();
  EXPECT_FALSE(worker_.pending);
  now_.steady += seconds(1);
  coordinator_.expire();
  EXPECT_TRUE(worker_.pending);
  worker_.succeed();
}

TEST_F(CoordinatorTest, AFailedExpiryIsTriedAgain) {
  create("leased", 10);
  worker_.succeed();
  worker_.idle = seconds(3600);
  now_.steady += seconds(10);
  coordinator_.expire();
  worker_.fail(absl::UnavailableError("busy"));
  coordinator_.expire();
  ASSERT_TRUE(worker_.pending);
  worker_.succeed();
}

TEST_F(CoordinatorTest, AForkInheritsTheSpec) {
  create("parent");
  worker_.succeed();
  v1::ForkContextRequest request;
  request.set_context_id("parent");
  request.set_new_context_id("child");
  request.set_num_tokens(0);
  std::optional<StatusOr<v1::Context>> forked;
  coordinator_.fork(request, [&](StatusOr<v1::Context> context) { forked = std::move(context); });
  worker_.succeed();
  ASSERT_TRUE(forked->ok());
  EXPECT_EQ((*forked)->spec().num_layers(), 1U);
  get("child");
  EXPECT_TRUE(answer_->ok());
}

}  // namespace
}  // namespace longspan
