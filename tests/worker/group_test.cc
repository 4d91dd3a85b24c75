// The face of a group: positions, staging, replays, capacity, deadlines, explanations and the end.
#include "worker/group.h"

#include <atomic>
#include <cmath>
#include <numeric>
#include <thread>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/compare.h"
#include "tests/support/methods.h"
#include "tests/worker/context_model.h"

namespace longspan::testing {
namespace {

using ::testing::HasSubstr;

Deadline far() { return std::chrono::steady_clock::now() + std::chrono::minutes(5); }

GroupOptions options_for(int num_ranks, int64_t capacity = int64_t{1} << 30) {
  GroupOptions options;
  options.num_ranks = num_ranks;
  options.kv_capacity_bytes = capacity;
  return options;
}

ContextShape small_shape(int num_ranks, std::vector<Method> methods = {dense_method()}) {
  ContextShape shape;
  shape.num_layers = 2;
  shape.num_query_heads = 4;
  shape.num_kv_heads = 2;
  shape.key_dim = 64;
  shape.value_dim = 64;
  shape.kv_dtype = DataType::kBFloat16;
  shape.scale = 0.125F;
  shape.methods = std::move(methods);
  shape.max_tokens = 4096;
  shape.layout.num_ranks = num_ranks;
  shape.layout.stripe_tokens = 64;
  return shape;
}

class GroupTest : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { start(options_for(GetParam())); }

  void start(const GroupOptions& options) {
    auto group = Group::start_in_process(options);
    ASSERT_TRUE(group.ok()) << group.status();
    group_ = *std::move(group);
  }

  ContextModel make_model(ContextHandle handle, ContextShape shape) {
    const Status status = group_->create(handle, shape);
    EXPECT_TRUE(status.ok()) << status;
    return {*group_, handle, std::move(shape), random_};
  }
  ContextModel make_model(std::vector<Method> methods = {dense_method()}) {
    return make_model(1, small_shape(GetParam(), std::move(methods)));
  }

  std::vector<int64_t> used() { return group_->usage().rank_bytes; }
  std::vector<int64_t> lengths(ContextHandle handle) {
    return group_->usage(handle)->layer_lengths;
  }

  Random random_{17};
  std::unique_ptr<Group> group_;
  Tally tally_;
};

std::string expected_pos(const Status& status) {
  const auto payload = status.GetPayload(kExpectedPosPayload);
  return payload.has_value() ? std::string(*payload) : "none";
}

TEST_P(GroupTest, StagedRowsShowAtCommit) {
  ContextModel model = make_model();
  const Rows rows = model.make_rows(100);
  ASSERT_TRUE(model.write(0, 0, rows).ok());
  EXPECT_THAT(lengths(1), ::testing::ElementsAre(0, 0));
  const Method dense = dense_method();
  const std::vector<float> query = random_.normals(4 * 64);
  AttendItem item{.context = 1,
                  .start_pos = 99,
                  .num_rows = 1,
                  .query = fp32(query),
                  .key = {},
                  .value = {},
                  .gates = {},
                  .search_query = {},
                  .method = &dense};
  EXPECT_EQ(group_->attend({&item, 1}, far())[0].status.code(), absl::StatusCode::kOutOfRange);
  // Staging goes on behind what is staged, across calls.
  const Rows more = model.make_rows(30);
  ASSERT_TRUE(model.write(0, 100, more).ok());
  ASSERT_TRUE(group_->commit(1).ok());
  EXPECT_THAT(lengths(1), ::testing::ElementsAre(130, 0));
  model.add(0, rows);
  model.add(0, more);
  model.ask({0, Phase::kDecode, 129, 1, false}, dense, tally_);
}

TEST_P(GroupTest, RollbackForgetsWhatIsStaged) {
  ContextModel model = make_model({quest_method(16, 4)});
  model.append(150);
  const std::vector<int64_t> before = used();
  ASSERT_TRUE(model.write(0, 150, model.make_rows(200)).ok());
  ASSERT_TRUE(model.write(1, 150, model.make_rows(1)).ok());
  ASSERT_TRUE(group_->rollback(1).ok());
  EXPECT_EQ(used(), before);
  EXPECT_THAT(lengths(1), ::testing::ElementsAre(150, 150));
  model.ask({0, Phase::kDecode, 150, 2, true}, model.shape().methods[0], tally_);
}

TEST_P(GroupTest, AWriteLeavesNoGap) {
  ContextModel model = make_model();
  model.append(70);
  const Status status = model.write(0, 72, model.make_rows(1));
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange) << status;
  EXPECT_EQ(expected_pos(status), "70");
}

TEST_P(GroupTest, EqualRowsAreWrittenOnce) {
  ContextModel model = make_model({nsa_method(32, 16, 64, 4, 96)});
  model.append(200);
  const std::vector<int64_t> before = used();
  ASSERT_TRUE(model.write(0, 0, model.stored_rows(0, 0, 200)).ok());
  ASSERT_TRUE(model.write(1, 63, model.stored_rows(1, 63, 130)).ok());
  EXPECT_EQ(used(), before);
  // Partly there: the old part is compared, the rest appended.
  Rows rows = model.stored_rows(0, 150, 200);
  const Rows fresh = model.make_rows(40);
  rows.keys.insert(rows.keys.end(), fresh.keys.begin(), fresh.keys.end());
  rows.values.insert(rows.values.end(), fresh.values.begin(), fresh.values.end());
  ASSERT_TRUE(model.write(0, 150, rows).ok());
  ASSERT_TRUE(group_->commit(1).ok());
  EXPECT_THAT(lengths(1), ::testing::ElementsAre(240, 200));
  model.add(0, fresh);
  model.ask({0, Phase::kDecode, 239, 1, false}, model.shape().methods[0], tally_);
}

TEST_P(GroupTest, OtherRowsInTheSamePlaceAreAborted) {
  ContextModel model = make_model();
  model.append(200);
  for (const int64_t position : {int64_t{0}, int64_t{64}, int64_t{131}, int64_t{199}}) {
    Rows rows = model.stored_rows(0, 0, 200);
    rows.values[static_cast<size_t>(position * 2 * 64 + 127)] += 1.0F;
    const Rows fresh = model.make_rows(9);
    rows.keys.insert(rows.keys.end(), fresh.keys.begin(), fresh.keys.end());
    rows.values.insert(rows.values.end(), fresh.values.begin(), fresh.values.end());
    const Status status = model.write(0, 0, rows);
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("position ", position)));
  }
  ASSERT_TRUE(group_->commit(1).ok());
  EXPECT_THAT(lengths(1), ::testing::ElementsAre(200, 200));  // nothing of them was stored
}

TEST_P(GroupTest, OneItemFailsAlone) {
  ContextModel model = make_model();
  model.append(100);
  ContextModel other = make_model(2, small_shape(GetParam()));
  other.append(90);
  const Method dense = dense_method();
  const std::vector<float> query = random_.normals(4 * 64);
  const Rows wrong = model.make_rows(1);
  AttendItem replaced;
  replaced.context = 1;
  replaced.start_pos = 50;
  replaced.num_rows = 1;
  replaced.query = fp32(query);
  replaced.key = fp32(wrong.keys);
  replaced.value = fp32(wrong.values);
  replaced.method = &dense;
  AttendItem good = replaced;
  good.context = 2;
  good.start_pos = 90;
  AttendItem twice = good;
  AttendItem unknown = replaced;
  unknown.context = 3;
  const std::vector<AttendItem> items{replaced, good, twice, unknown};
  const std::vector<AttendResult> results = group_->attend(items, far());
  EXPECT_EQ(results[0].status.code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(results[0].out.empty());
  EXPECT_TRUE(results[1].status.ok()) << results[1].status;
  EXPECT_EQ(results[1].layer_length, 91);
  EXPECT_EQ(results[1].visible_tokens, 91 * 4);
  EXPECT_EQ(results[1].selected_tokens, 91 * 4);
  EXPECT_EQ(results[2].status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(results[3].status.code(), absl::StatusCode::kNotFound);
}

TEST_P(GroupTest, AttendingDoesNotMixWithAnAppend) {
  ContextModel model = make_model();
  model.append(10);
  ASSERT_TRUE(model.write(0, 10, model.make_rows(5)).ok());
  const Method dense = dense_method();
  const std::vector<float> query = random_.normals(4 * 64);
  const Rows row = model.make_rows(1);
  AttendItem item;
  item.context = 1;
  item.start_pos = 10;
  item.num_rows = 1;
  item.query = fp32(query);
  item.key = fp32(row.keys);
  item.value = fp32(row.values);
  item.method = &dense;
  EXPECT_EQ(group_->attend({&item, 1}, far())[0].status.code(), absl::StatusCode::kAborted);
  model.ask({0, Phase::kDecode, 9, 1, false}, dense, tally_);  // what is visible can be asked
}

TEST_P(GroupTest, FullRanksRefuseBeforeAnythingIsTaken) {
  const int64_t page = int64_t{64} * 2 * 128 * 2;
  start(options_for(GetParam(), GetParam() * 10 * page));
  ContextModel model = make_model();
  model.append(GetParam() * 4 * 64);  // two layers, so 8 of 10 pages a rank
  const std::vector<int64_t> before = used();
  Status status = model.write(0, model.length(0), model.make_rows(GetParam() * 2 * 64 + 1));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_EQ(used(), before);
  const Rows rows = model.make_rows(GetParam() * 2 * 64);
  status = model.write(0, model.length(0), rows);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(used(), std::vector<int64_t>(static_cast<size_t>(GetParam()), 10 * page));
  EXPECT_EQ(model.write(1, model.length(1), model.make_rows(1)).code(),
            absl::StatusCode::kResourceExhausted);
  // A fork's first write would copy the shared page, which does not fit either.
  ASSERT_TRUE(group_->rollback(1).ok());
  ContextModel child = model.fork(2, 1);
  EXPECT_EQ(used(), before);
  EXPECT_EQ(child.write(0, 1, child.make_rows(1 + GetParam() * 3 * 64)).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(child.write(0, 1, child.make_rows(1)).ok());
}

TEST_P(GroupTest, APassedDeadlineHasNoEffect) {
  ContextModel model = make_model();
  model.append(10);
  const Method dense = dense_method();
  const std::vector<float> query = random_.normals(4 * 64);
  const Rows row = model.make_rows(1);
  AttendItem item;
  item.context = 1;
  item.start_pos = 10;
  item.num_rows = 1;
  item.query = fp32(query);
  item.key = fp32(row.keys);
  item.value = fp32(row.values);
  item.method = &dense;
  const auto past = std::chrono::steady_clock::now() - std::chrono::seconds(1);
  EXPECT_EQ(group_->attend({&item, 1}, past)[0].status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(lengths(1), ::testing::ElementsAre(10, 10));
}

// Enough rows for several rounds.
ContextShape wide_shape(int num_ranks) {
  ContextShape shape = small_shape(num_ranks);
  shape.num_layers = 1;
  shape.num_query_heads = 64;
  shape.num_kv_heads = 1;
  shape.value_dim = 128;
  shape.max_tokens = int64_t{1} << 16;
  return shape;
}

TEST_P(GroupTest, ADeadlineWithinTheStepTakesBackWhatWasWritten) {
  ContextModel model = make_model(1, wide_shape(GetParam()));
  const std::vector<int64_t> before = used();
  const Method dense = dense_method();
  // Far more work than the deadline leaves time for: it passes in some round after the first.
  constexpr int64_t kRows = 20000;
  const std::vector<float> query(static_cast<size_t>(kRows) * 64 * 64, 0.25F);
  const Rows rows{std::vector<float>(static_cast<size_t>(kRows) * 64, 0.5F),
                  std::vector<float>(static_cast<size_t>(kRows) * 128, 0.5F)};
  AttendItem item;
  item.context = 1;
  item.phase = Phase::kPrefill;
  item.num_rows = kRows;
  item.query = fp32(query);
  item.key = fp32(rows.keys);
  item.value = fp32(rows.values);
  item.method = &dense;
  const auto soon = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
  const AttendResult result = group_->attend({&item, 1}, soon)[0];
  EXPECT_EQ(result.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(result.out.empty());
  EXPECT_THAT(lengths(1), ::testing::ElementsAre(0));
  EXPECT_EQ(used(), before);
}

TEST_P(GroupTest, RoundsOfRowsAnswerAsSingleRows) {
  ContextModel model = make_model(1, wide_shape(GetParam()));
  const Method dense = dense_method();
  constexpr int64_t kRows = 1500;
  const std::vector<float> query = random_.normals(static_cast<size_t>(kRows) * 64 * 64);
  const Rows rows = model.make_rows(kRows);
  AttendItem item;
  item.context = 1;
  item.phase = Phase::kPrefill;
  item.num_rows = kRows;
  item.query = fp32(query);
  item.key = fp32(rows.keys);
  item.value = fp32(rows.values);
  item.method = &dense;
  const AttendResult all = group_->attend({&item, 1}, far())[0];
  ASSERT_TRUE(all.status.ok()) << all.status;
  for (const int64_t row : {int64_t{0}, int64_t{700}, kRows - 1}) {
    AttendItem one;
    one.context = 1;
    one.start_pos = row;
    one.num_rows = 1;
    one.query = {DataType::kFloat32, query.data() + row * 64 * 64};
    one.method = &dense;
    const AttendResult single = group_->attend({&one, 1}, far())[0];
    ASSERT_TRUE(single.status.ok()) << single.status;
    const std::span<const float> out =
        std::span(all.out).subspan(static_cast<size_t>(row) * 64 * 128, size_t{64} * 128);
    EXPECT_TRUE(
        outputs_match(out, std::span<const float>(single.out), 128, tolerance(DataType::kBFloat16)))
        << "row " << row;
  }
}

TEST_P(GroupTest, ForksOnlyWhatIsThere) {
  ContextModel model = make_model();
  model.append(100);
  ASSERT_TRUE(group_->create(9, small_shape(GetParam())).ok());
  EXPECT_EQ(group_->fork(1, 9, 5).code(), absl::StatusCode::kAlreadyExists);
  const Status status = group_->fork(1, 2, 101);
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(expected_pos(status), "100");
  EXPECT_EQ(group_->truncate(1, 101).code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(group_->truncate(1, -1).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(group_->fork(7, 8, 0).code(), absl::StatusCode::kNotFound);
  const std::vector<int64_t> before = used();
  ASSERT_TRUE(group_->fork(1, 2, 100).ok());
  EXPECT_EQ(used(), before);  // shared
  EXPECT_EQ(group_->usage(2)->kv_bytes, group_->usage(1)->kv_bytes);
}

TEST_P(GroupTest, RefusesBadShapes) {
  const auto refused = [&](auto change, const std::string& field) {
    ContextShape shape = small_shape(GetParam());
    change(shape);
    const Status status = group_->create(5, shape);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(field));
  };
  refused([](ContextShape& shape) { shape.num_layers = 0; }, "num_layers");
  refused([](ContextShape& shape) { shape.num_kv_heads = 3; }, "num_kv_heads");
  refused([](ContextShape& shape) { shape.key_dim = -1; }, "key_dim");
  refused([](ContextShape& shape) { shape.max_tokens = 0; }, "max_tokens");
  refused([](ContextShape& shape) { shape.scale = 0; }, "scale");
  refused([](ContextShape& shape) { shape.sink_logits = {1.0F}; }, "sink_logits");
  refused([](ContextShape& shape) { shape.methods.clear(); }, "methods");
  refused([](ContextShape& shape) { shape.methods[0].branches.clear(); }, "branches");
  refused([](ContextShape& shape) { shape.layout.num_ranks += 1; }, "layout.num_ranks");
  refused([](ContextShape& shape) { shape.layout.stripe_tokens = 100; }, "layout.stripe_tokens");
  refused([](ContextShape& shape) { shape.methods = {moba_method(4096, 2)}; },
          "layout.stripe_tokens");
}

TEST_P(GroupTest, AMethodGivenWithTheCallNeedsItsSummaries) {
  ContextModel model = make_model({quest_method(16, 4)});
  model.append(300);
  // The same summaries, another budget: served.
  const Method smaller = quest_method(16, 2);
  model.ask({0, Phase::kDecode, 299, 1, false}, smaller, tally_);
  // None at all: served.
  model.ask({0, Phase::kDecode, 299, 1, false}, window_method(33, 4), tally_);
  const Method moba = moba_method(64, 2);
  const Method nsa = nsa_method(64, 64, 64, 4, 64);
  const std::vector<float> query = random_.normals(4 * 64);
  AttendItem item;
  item.context = 1;
  item.start_pos = 299;
  item.num_rows = 1;
  item.query = fp32(query);
  item.method = &moba;
  const AttendResult result = group_->attend({&item, 1}, far())[0];
  EXPECT_EQ(result.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(result.status.message()), HasSubstr("branches[0].summary"));
  item.method = nullptr;
  EXPECT_EQ(group_->attend({&item, 1}, far())[0].status.code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(GroupTest, AsksForWhatTheMethodNeeds) {
  const Method nsa = nsa_method(32, 16, 64, 4, 96);
  const Method superlinear = superlinear_method({});
  ContextModel model = make_model({nsa, superlinear});
  model.append(80);
  const std::vector<float> query = random_.normals(4 * 64);
  AttendItem item;
  item.context = 1;
  item.start_pos = 79;
  item.num_rows = 1;
  item.query = fp32(query);
  item.method = &nsa;
  EXPECT_THAT(std::string(group_->attend({&item, 1}, far())[0].status.message()),
              HasSubstr("gates"));
  item.method = &superlinear;
  EXPECT_THAT(std::string(group_->attend({&item, 1}, far())[0].status.message()),
              HasSubstr("search_query"));
  item.query = {};
  EXPECT_THAT(std::string(group_->attend({&item, 1}, far())[0].status.message()),
              HasSubstr("query: missing"));
}

// Shares of dense attention by their definition, in double precision.
struct Shares {
  std::vector<double> weights;  // by token
  double of(Span span) const {
    return std::accumulate(weights.begin() + span.begin, weights.begin() + span.end, 0.0);
  }
};

Shares dense_shares(const ContextModel& model, const std::vector<float>& query, size_t head) {
  const Rows stored = model.stored_rows(0, 0, model.length(0));
  Shares shares;
  double total = 0;
  for (size_t token = 0; token < static_cast<size_t>(model.length(0)); ++token) {
    double logit = 0;
    for (size_t d = 0; d < 64; ++d) {
      logit += double{query[head * 64 + d]} * stored.keys[(token * 2 + head / 2) * 64 + d];
    }
    shares.weights.push_back(std::exp(logit * 0.125));
    total += shares.weights.back();
  }
  for (double& weight : shares.weights) {
    weight /= total;
  }
  return shares;
}

TEST_P(GroupTest, ExplainsWhatASelectionCaptures) {
  ContextModel model = make_model({quest_method(16, 4), dense_method()});
  model.append(400);
  const std::vector<float> query = random_.normals(4 * 64);
  AttendItem item;
  item.context = 1;
  item.start_pos = 399;
  item.num_rows = 1;
  item.query = fp32(query);
  item.method = &model.shape().methods[0];
  item.compare_with_dense = true;
  const AttendResult result = group_->attend({&item, 1}, far())[0];
  ASSERT_TRUE(result.status.ok()) << result.status;
  item.method = &model.shape().methods[1];
  const AttendResult dense = group_->attend({&item, 1}, far())[0];
  ASSERT_TRUE(dense.status.ok()) << dense.status;
  ASSERT_EQ(result.selections.size(), 4U);
  ASSERT_EQ(result.recall.size(), 4U);
  for (size_t head = 0; head < 4; ++head) {
    const Shares shares = dense_shares(model, query, head);
    const RowSelection& selection = result.selections[head];
    EXPECT_EQ(selection.query_head, static_cast<int>(head));
    EXPECT_EQ(selection.position, 399);
    EXPECT_EQ(selection.num_tokens, 64);
    double recall = 0;
    int scored = 0;
    for (const SelectedSpan& span : selection.spans) {
      EXPECT_EQ(span.rank, static_cast<int>(span.begin / 64 % GetParam()));
      ASSERT_TRUE(span.mass.has_value());
      EXPECT_NEAR(*span.mass, shares.of({span.begin, span.end}), 1e-3);
      recall += shares.of({span.begin, span.end});
      scored += span.score.has_value() ? 1 : 0;
    }
    EXPECT_EQ(scored, 3);  // the query's own page is forced
    EXPECT_NEAR(result.recall[head], recall, 1e-3);
    double difference = 0;
    double length = 0;
    for (size_t e = head * 64; e < (head + 1) * 64; ++e) {
      difference += std::pow(double{result.out[e]} - dense.out[e], 2);
      length += std::pow(dense.out[e], 2);
    }
    EXPECT_NEAR(result.relative_error[head], std::sqrt(difference / length), 1e-3);
    EXPECT_NEAR(dense.recall[head], 1.0, 1e-4);
    EXPECT_NEAR(dense.relative_error[head], 0.0, 1e-4);
  }
}

TEST_P(GroupTest, StopInterruptsAndStays) {
  ContextModel model = make_model();
  model.append(100);
  std::atomic<bool> stopped{false};
  std::thread stopper([&] {
    group_->stop();
    stopped = true;
  });
  const Method dense = dense_method();
  const std::vector<float> query = random_.normals(4 * 64);
  AttendItem item;
  item.context = 1;
  item.start_pos = 99;
  item.num_rows = 1;
  item.query = fp32(query);
  item.method = &dense;
  // Steps run until the group says that it is gone; a lone rank meets that between steps only.
  Status status;
  while (status.ok() && !stopped) {
    status = group_->attend({&item, 1}, far())[0].status;
  }
  stopper.join();
  group_->stop();
  status = group_->attend({&item, 1}, far())[0].status;
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(group_->commit(1).code(), absl::StatusCode::kUnavailable);
}

std::string name_of_ranks(const ::testing::TestParamInfo<int>& ranks) {
  return absl::StrCat("ranks_", ranks.param);
}
INSTANTIATE_TEST_SUITE_P(Ranks, GroupTest, ::testing::Values(1, 2, 4), name_of_ranks);

TEST(Group, RefusesBadOptions) {
  GroupOptions options;
  options.num_ranks = 0;
  EXPECT_EQ(Group::start_in_process(options).status().code(), absl::StatusCode::kInvalidArgument);
  options = {};
  options.backend = "abacus";
  EXPECT_EQ(Group::start_in_process(options).status().code(), absl::StatusCode::kNotFound);
  options = {};
  options.threads_per_rank = 0;
  EXPECT_EQ(Group::start_in_process(options).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace longspan::testing
