#include "kernels/method.h"

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kernels/anchors.h"
#include "tests/support/methods.h"

namespace longspan {
namespace {

using ::testing::Contains;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

std::vector<std::string> violated_fields(const Method& method) {
  std::vector<std::string> fields;
  for (const FieldViolation& violation : validate(method)) {
    EXPECT_FALSE(violation.description.empty());
    fields.push_back(violation.field);
  }
  return fields;
}

TEST(Summary, EntriesAppearWithTheirLastToken) {
  SummarySpec windows;
  windows.kind = SummaryKind::kCompressed;
  windows.window_tokens = 32;
  windows.stride_tokens = 16;
  const auto count = [&](int64_t tokens) { return windows.num_entries(tokens); };
  EXPECT_EQ(count(0), 0);
  EXPECT_EQ(count(31), 0);
  EXPECT_EQ(count(32), 1);
  EXPECT_EQ(count(47), 1);
  EXPECT_EQ(count(48), 2);
  EXPECT_EQ(count(1 << 20), 65535);

  SummarySpec blocks;
  blocks.kind = SummaryKind::kMean;
  blocks.block_tokens = 64;
  EXPECT_EQ(blocks.num_entries(63), 0);
  EXPECT_EQ(blocks.num_entries(64), 1);
  EXPECT_EQ(blocks.num_entries(127), 1);
}

TEST(Amount, CountsTokensAndRatios) {
  Amount amount;
  amount.value = 16;
  EXPECT_EQ(amount.blocks(100, 64), 16);
  EXPECT_EQ(amount.blocks(5, 64), 5) << "never more than there are";

  amount.kind = Amount::Kind::kTokens;
  amount.value = 1000;
  EXPECT_EQ(amount.blocks(100, 64), 15) << "rounded down";
  amount.value = 10;
  EXPECT_EQ(amount.blocks(100, 64), 1) << "at least one block";

  amount.kind = Amount::Kind::kRatio;
  amount.value = 0.1;
  EXPECT_EQ(amount.blocks(70, 64), 7) << "0.1 * 70 is a little more than 7 in binary";
  EXPECT_EQ(amount.blocks(71, 64), 8) << "rounded up";
  amount.value = 1;
  EXPECT_EQ(amount.blocks(71, 64), 71);
}

TEST(Amount, BoundsApplyAfterTheAmount) {
  Amount amount;
  amount.kind = Amount::Kind::kRatio;
  amount.value = 0.1;
  amount.min_blocks = 8;
  amount.max_blocks = 20;
  EXPECT_EQ(amount.blocks(10, 64), 8);
  EXPECT_EQ(amount.blocks(1000, 64), 20);
  EXPECT_EQ(amount.blocks(6, 64), 6);
}

TEST(Methods, PublishedOnesAreWellFormed) {
  for (const Method& method : testing::all_methods()) {
    EXPECT_THAT(violated_fields(method), IsEmpty()) << method.name;
  }
}

TEST(Methods, KnowWhatTheyNeed) {
  const Method nsa = testing::nsa_method(32, 16, 64, 16, 512);
  EXPECT_TRUE(nsa.needs_gates());
  EXPECT_FALSE(nsa.has_lse());
  EXPECT_FALSE(nsa.needs_search_query());
  EXPECT_EQ(nsa.summaries().size(), 1U) << "two branches share one summary";
  EXPECT_EQ(nsa.alignment_tokens(), 64);

  const Method spans = testing::superlinear_method({});
  EXPECT_TRUE(spans.needs_search_query());
  EXPECT_FALSE(spans.has_lse());
  EXPECT_THAT(spans.summaries(), IsEmpty());

  EXPECT_EQ(testing::quest_method(16, 4).alignment_tokens(), 64);
  EXPECT_EQ(testing::moba_method(4096, 12).alignment_tokens(), 4096);
  EXPECT_EQ(testing::nsa_method(256, 64, 256, 8, 512).alignment_tokens(), 256);

  Method supplied = testing::moba_method(64, 3);
  supplied.branches[0].search.query = QuerySource::kSupplied;
  EXPECT_TRUE(supplied.needs_search_query());
}

TEST(Methods, RolesMakeCallsDense) {
  Method method = testing::moba_method(64, 3);
  method.dense_layers = {0, 5};
  method.dense_decode = true;
  method.dense_below_tokens = 1000;
  const auto name = [&](int layer, Phase phase, int64_t tokens) {
    return effective_method(method, layer, phase, tokens).name;
  };
  EXPECT_EQ(name(1, Phase::kPrefill, 1000), "moba");
  EXPECT_EQ(name(1, Phase::kPrefill, 999), "dense");
  EXPECT_EQ(name(5, Phase::kPrefill, 1000), "dense");
  EXPECT_EQ(name(1, Phase::kDecode, 1000), "dense");
  method.dense_decode = false;
  method.dense_prefill = true;
  EXPECT_EQ(name(1, Phase::kPrefill, 1000), "dense");
  EXPECT_EQ(name(1, Phase::kDecode, 1000), "moba");
}

TEST(Methods, SelectionHeads) {
  SearchSpec search;
  EXPECT_EQ(num_selection_heads(search, 12, 3), 12);
  search.query_reduce = QueryReduce::kGroupMean;
  EXPECT_EQ(num_selection_heads(search, 12, 3), 3);
  search.head_reduce = HeadReduce::kAllMax;
  EXPECT_EQ(num_selection_heads(search, 12, 3), 1);
  search.query_reduce = QueryReduce::kNone;
  search.head_reduce = HeadReduce::kGroupSum;
  EXPECT_EQ(num_selection_heads(search, 12, 3), 3);
}

struct BadMethod {
  std::string name;
  std::function<Method()> make;
  std::function<void(Branch&, Method&)> spoil;
  std::string field;
};

class Validation : public ::testing::TestWithParam<BadMethod> {};

TEST_P(Validation, NamesTheField) {
  Method method = GetParam().make();
  ASSERT_THAT(violated_fields(method), IsEmpty());
  const size_t last = method.branches.size() == 3 ? 1 : 0;  // NSA's selected branch
  Branch branch = method.branches[last];
  GetParam().spoil(branch, method);
  if (!method.branches.empty()) {
    method.branches[last] = branch;
  }
  EXPECT_THAT(violated_fields(method), Contains(GetParam().field));
}

Method nsa() { return testing::nsa_method(32, 16, 64, 16, 512); }
Method moba() { return testing::moba_method(64, 3); }
Method quest() { return testing::quest_method(16, 4); }
Method spans() { return testing::superlinear_method({}); }

#define SPOIL [](Branch & branch [[maybe_unused]], Method & method [[maybe_unused]])
const BadMethod kBadMethods[] = {{"NoBranch", moba, SPOIL{method.branches.clear();
}  // namespace
, "branches"
}  // namespace longspan
, {"TwoBranchesByLse", moba, SPOIL{method.branches.push_back(branch);
}
, "merge.kind"
}
, {"BlockNoPowerOfTwo",
   moba,
   SPOIL{branch.selection.block_tokens = branch.summary.block_tokens = 96;
}
, "branches[0].selection.block_tokens"
}
, {"BlockTooLarge", moba, SPOIL{branch.summary.block_tokens = 1 << 17;
}
, "branches[0].summary.block_tokens"
}
, {"BlockUnlikeSummary", moba, SPOIL{branch.selection.block_tokens = 128;
}
, "branches[0].selection.block_tokens"
}
, {"NoSummary", moba, SPOIL{branch.summary = {};
}
, "branches[0].summary.kind"
}
, {"BoundOfMeans", moba, SPOIL{branch.search.score = ScoreKind::kBound;
}
, "branches[0].search.score"
}
, {"DotOfExtremes", quest, SPOIL{branch.search.score = ScoreKind::kDot;
}
, "branches[0].search.score"
}
, {"SoftmaxOfMeans", moba, SPOIL{branch.search.normalise = Normalise::kSoftmax;
}
, "branches[0].search.normalise"
}
, {"ScaledExtremes", quest, SPOIL{branch.summary.scale_by_sqrt_length = true;
}
, "branches[0].summary.scale_by_sqrt_length"
}
, {"ReducedTwice", moba, SPOIL{branch.search.query_reduce = QueryReduce::kGroupMean;
branch.search.head_reduce = HeadReduce::kGroupSum;
}
, "branches[0].search.head_reduce"
}
, {"NoForcedLast", moba, SPOIL{branch.selection.forced_last_blocks = 0;
}
, "branches[0].selection.forced_last_blocks"
}
, {"NegativeForcedFirst", moba, SPOIL{branch.selection.forced_first_blocks = -1;
}
, "branches[0].selection.forced_first_blocks"
}
, {"NoPrefillBudget", moba, SPOIL{branch.budget.prefill.value = 0;
}
, "branches[0].budget.prefill.blocks"
}
, {"HalfABlock", moba, SPOIL{branch.budget.decode.value = 1.5;
}
, "branches[0].budget.decode.blocks"
}
, {"BudgetNotANumber",
   moba,
   SPOIL{branch.budget.decode.value = std::numeric_limits<double>::quiet_NaN();
}
, "branches[0].budget.decode.blocks"
}
, {"RatioAboveOne", moba, SPOIL{branch.budget.decode.kind = Amount::Kind::kRatio;
branch.budget.decode.value = 1.01;
}
, "branches[0].budget.decode.ratio"
}
, {"BoundsCross", moba, SPOIL{branch.budget.decode.min_blocks = 4;
branch.budget.decode.max_blocks = 3;
}
, "branches[0].budget.decode.max_blocks"
}
, {"NegativeWindow", moba, SPOIL{branch.mask.window_tokens = -1;
}
, "branches[0].mask.window_tokens"
}
, {"NegativeSinks", moba, SPOIL{branch.mask.sink_tokens = -1;
}
, "branches[0].mask.sink_tokens"
}
, {"NothingAttended", [] { return testing::window_method(4, 0); }, SPOIL{branch.mask = {};
}
, "branches[0].mask"
}
, {"AllAndMask", dense_method, SPOIL{branch.mask.window_tokens = 4;
}
, "branches[0].mask"
}
, {"BudgetWithoutSearch", dense_method, SPOIL{branch.budget.decode.value = 4;
}
, "branches[0].budget"
}
, {"SearchWithoutTopK", dense_method, SPOIL{branch.search.query = QuerySource::kSupplied;
}
, "branches[0].search"
}
, {"BlocksWithoutTopK", dense_method, SPOIL{branch.selection.block_tokens = 64;
}
, "branches[0].selection"
}
, {"UnusedSummary", dense_method, SPOIL{branch.summary.kind = SummaryKind::kMean;
branch.summary.block_tokens = 64;
}
, "branches[0].summary.kind"
}
, {"StrideAboveWindow", nsa, SPOIL{branch.summary.stride_tokens = 64;
}
, "branches[1].summary.stride_tokens"
}
, {"StrideAbovePage", nsa, SPOIL{branch.summary.window_tokens = branch.summary.stride_tokens = 128;
branch.selection.block_tokens = 128;
}
, "branches[1].summary.stride_tokens"
}
, {"WindowReachesTooFar", nsa, SPOIL{branch.summary.window_tokens = 128;
}
, "branches[1].summary.window_tokens"
}
, {"BlockBelowStride", nsa, SPOIL{branch.selection.block_tokens = 8;
}
, "branches[1].selection.block_tokens"
}
, {"WeightCount", nsa, SPOIL{branch.summary.key_weights = {1, 2, 3};
}
, "branches[1].summary.key_weights"
}
, {"WeightNotANumber", nsa, SPOIL{branch.summary.value_weights.assign(32, std::nanf(""));
}
, "branches[1].summary.value_weights"
}
, {"WeightsOfMeans", moba, SPOIL{branch.summary.key_weights.assign(64, 1);
}
, "branches[0].summary.key_weights"
}
, {"RawScoresOfOverlappingWindows", nsa, SPOIL{branch.search.normalise = Normalise::kRaw;
}
, "branches[1].selection.block_tokens"
}
, {"SoftmaxOfReducedQueries", nsa, SPOIL{branch.search.head_reduce = HeadReduce::kNone;
branch.search.query_reduce = QueryReduce::kGroupMean;
}
, "branches[1].search.query_reduce"
}
, {"SoftmaxOfSearchQuery", nsa, SPOIL{branch.search.query = QuerySource::kSupplied;
}
, "branches[1].search.query"
}
, {"SummariesThatSelect", nsa, SPOIL{branch.source = BranchSource::kSummaries;
}
, "branches[1].selection.kind"
}
, {"SummariesWithMask", nsa, SPOIL{branch.source = BranchSource::kSummaries;
branch.mask.sink_tokens = 1;
}
, "branches[1].mask"
}
, {"SpansByLse", spans, SPOIL{method.merge = MergeKind::kLse;
}
, "merge.kind"
}
, {"SpanScoresOfBlocks", moba, SPOIL{method.merge = MergeKind::kSpanScores;
}
, "merge.kind"
}
, {"SpanScoresOfTwo", spans, SPOIL{method.branches.push_back(branch);
}
, "merge.kind"
}
, {"AnchorsWithoutSpans", spans, SPOIL{branch.selection.spans = false;
}
, "branches[0].selection.spans"
}
, {"SpansWithoutAnchors", spans, SPOIL{branch.search.view = SearchView::kSummary;
}
, "branches[0].search.view"
}
, {"AnchorsWithWindow", spans, SPOIL{branch.mask.window_tokens = 64;
}
, "branches[0].mask.window_tokens"
}
, {"AnchorsWithSinks", spans, SPOIL{branch.mask.sink_tokens = 4;
}
, "branches[0].mask.sink_tokens"
}
, {"AnchorsWithSummary", spans, SPOIL{branch.summary = moba().branches[0].summary;
}
, "branches[0].summary.kind"
}
, {"AnchorPowerAboveOne", spans, SPOIL{branch.search.anchor_power = {3, 2};
}
, "branches[0].search.anchors.power"
}
, {"AnchorPowerZero", spans, SPOIL{branch.search.anchor_power = {0, 1};
}
, "branches[0].search.anchors.power"
}
, {"SpanPowerWithoutDenominator", spans, SPOIL{branch.selection.span_power = {1, 0};
}
, "branches[0].selection.spans.power"
}
, {"NegativeSpan", spans, SPOIL{branch.selection.span_backward = {-1, 1};
}
, "branches[0].selection.spans.backward"
}
, {"SpansByTokens", spans, SPOIL{branch.budget.decode.kind = Amount::Kind::kTokens;
}
, "branches[0].budget.decode.tokens"
}
, {"ForcedSpans", spans, SPOIL{branch.selection.forced_first_blocks = 1;
}
, "branches[0].selection.forced_first_blocks"
}
, {"NegativeStripe", spans, SPOIL{branch.search.anchor_first_stripe = -1;
}
, "branches[0].search.anchors.first_stripe"
}
, {"DenseLayerTwice", moba, SPOIL{method.dense_layers = {3, 3};
}
, "roles.dense_layers"
}
, {"NegativeDenseLayer", moba, SPOIL{method.dense_layers = {-1};
}
, "roles.dense_layers"
}
, {"NegativeDenseBelow", moba, SPOIL{method.dense_below_tokens = -1;
}
, "roles.dense_below_tokens"
}
,
}
;
#undef SPOIL

INSTANTIATE_TEST_SUITE_P(Rules, Validation, ::testing::ValuesIn(kBadMethods), [](const auto& test) {
  return test.param.name;
});

TEST(Validation, ListsEveryReasonAtOnce) {
  Method method = nsa();
  method.branches[0].summary.stride_tokens = 3;
  method.branches[1].selection.forced_last_blocks = 0;
  method.branches[2].mask.window_tokens = -5;
  method.dense_below_tokens = -1;
  EXPECT_THAT(violated_fields(method),
              UnorderedElementsAre("branches[0].summary.stride_tokens",
                                   "branches[1].selection.forced_last_blocks",
                                   "branches[2].mask.window_tokens",
                                   "roles.dense_below_tokens"));
}

TEST(Validation, AcceptsWhatTextAloneMayAskFor) {
  // Own compression weights, importance per head, a budget by ratio: no published method, all data.
  Method method = nsa();
  for (size_t i : {0, 1}) {
    method.branches[i].summary.key_weights.assign(32, 0.25F);
  }
  method.branches[1].search.head_reduce = HeadReduce::kNone;
  method.branches[1].budget.decode = {Amount::Kind::kRatio, 0.05, 4, 64};
  EXPECT_THAT(violated_fields(method), IsEmpty());
}

}  // namespace
}  // namespace longspan
