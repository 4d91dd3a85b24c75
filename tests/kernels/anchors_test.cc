#include "kernels/anchors.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cases.h"
#include "tests/support/methods.h"

namespace longspan {
namespace {

using ::testing::ElementsAre;
using testing::SpanSearch;
using testing::superlinear_method;

// The paper's extended and the released model's settings.
SpanSearch extended() {
  return {.power = {1, 2}, .backward = {4, 1}, .forward = {2, 1}, .spans = 2, .first_stripe = 32};
}
SpanSearch released() {
  return {.power = {11, 20}, .backward = {3, 1}, .forward = {1, 1}, .spans = 3, .first_stripe = 65};
}

int64_t power(int64_t base, int exponent) {
  int64_t result = 1;
  for (int i = 0; i < exponent; ++i) {
    result *= base;
  }
  return result;
}

TEST(Rationals, FromDoubles) {
  const auto fraction = [](double value) { return rational_from_double(value).value(); };
  EXPECT_EQ(fraction(0.5), (Rational{1, 2}));
  EXPECT_EQ(fraction(0.55), (Rational{11, 20}));
}

TEST(Rationals, SimplestFractionWins) {
  EXPECT_EQ(rational_from_double(0).value(), (Rational{0, 1}));
  EXPECT_EQ(rational_from_double(3).value(), (Rational{3, 1}));
  EXPECT_EQ(rational_from_double(0.999).value(), (Rational{999, 1000}));
  EXPECT_EQ(rational_from_double(1.0 / 3).value(), (Rational{1, 3}));
}

TEST(Rationals, RefusesWhatHasNoSmallDenominator) {
  for (const double value :
       {0.12345, static_cast<double>(0.55F), std::sqrt(0.5), -0.5, 1e7, std::nan(""), HUGE_VAL}) {
    EXPECT_EQ(rational_from_double(value).status().code(), absl::StatusCode::kInvalidArgument)
        << value;
  }
}

TEST(Powers, SquaresAndRoots) {
  for (int64_t i = 1; i <= 4000; ++i) {
    EXPECT_EQ(floor_root(i, {1, 2}), i * i);
    EXPECT_EQ(floor_root(i, {1, 1}), i);
    // ceil(2 sqrt(N)) at, below and above a square.
    EXPECT_EQ(ceil_scaled_power({2, 1}, i * i, {1, 2}), 2 * i);
    EXPECT_EQ(ceil_scaled_power({2, 1}, i * i + 1, {1, 2}), 2 * i + 1);
    EXPECT_EQ(ceil_scaled_power({1, 2}, 4 * i * i, {1, 2}), i);
    EXPECT_EQ(ceil_scaled_power({1, 2}, 4 * i * i + 1, {1, 2}), i + 1);
  }
}

TEST(Powers, ExactWhereDoublesAreInDoubt) {
  // m^11 to the power 20/11 is m^20, an integer; its neighbours are not.
  for (const int64_t m : {1, 2, 3}) {
    const int64_t base = power(m, 11);
    EXPECT_EQ(floor_root(base, {11, 20}), power(m, 20));
    EXPECT_EQ(ceil_scaled_power({1, 1}, power(m, 20), {11, 20}), base);
    EXPECT_EQ(ceil_scaled_power({7, 3}, power(m, 20), {11, 20}), (7 * base + 2) / 3);
    EXPECT_EQ(ceil_scaled_power({1, 1}, power(m, 20) + 1, {11, 20}), base + 1);
  }
  // 3^20 - 1 and 3^20 have powers 2e-5 apart: ceil separates them from what is below.
  EXPECT_EQ(ceil_scaled_power({1, 1}, power(3, 20) - 1, {11, 20}), power(3, 11));
  EXPECT_EQ(floor_root(power(2, 11) - 1, {11, 20}), 1047645);  // 2^20 (1 - 2^-11)^(20/11)
}

TEST(Powers, ReducedAndUnreducedFractionsAgree) {
  for (int64_t i = 1; i < 500; ++i) {
    EXPECT_EQ(floor_root(i, {110, 200}), floor_root(i, {11, 20}));
    EXPECT_EQ(ceil_scaled_power({30, 10}, i, {500, 1000}), ceil_scaled_power({3, 1}, i, {1, 2}));
  }
}

TEST(Powers, SaturateAndVanish) {
  EXPECT_EQ(floor_root(1 << 20, {1, 8}), int64_t{1} << 38);
  EXPECT_EQ(ceil_scaled_power({1000, 1}, int64_t{1} << 40, {1, 1}), int64_t{1} << 38);
  EXPECT_EQ(ceil_scaled_power({0, 1}, 1000, {1, 2}), 0);
  EXPECT_EQ(ceil_scaled_power({1, 1000}, 1, {1, 2}), 1);
}

TEST(Anchors, WindowsOfThePublishedSettings) {
  EXPECT_EQ(static_window(superlinear_method({}).branches[0]), 0);
  EXPECT_EQ(static_window(superlinear_method(extended()).branches[0]), 1088);
  EXPECT_EQ(static_window(superlinear_method(released()).branches[0]), 2032);
  EXPECT_EQ(static_window(testing::window_method(70, 5).branches[0]), 70);
}

TEST(Anchors, WorkOfThePublishedSettingsAtAMillion) {
  const int64_t position = (1 << 20) - 1;
  const auto work = [&](const SpanSearch& search) {
    const Branch branch = superlinear_method(search).branches[0];
    AnchorTable table(branch.search);
    const SpanReach reach = span_reach(branch.selection, position);
    const int64_t span = reach.backward + reach.forward + 1;
    return std::pair<int64_t, int64_t>(table.offsets(position).size(),
                                       static_window(branch) + search.spans * span);
  };
  EXPECT_EQ(work(extended()), (std::pair<int64_t, int64_t>(992, 13378)));
  // (2^20)^(11/20) is 2^11 exactly. A floating-point power lands just above it, and each ceil then
  // adds a token: 26617.
  EXPECT_EQ(work(released()), (std::pair<int64_t, int64_t>(1983, 26611)));
}

TEST(Anchors, SmallCaseByHand) {
  // p = 1/2, sw = 1: distances 4, 9, 16; a query at 11 sees 12 tokens and a window of 3.
  SpanSearch search;
  search.first_stripe = 1;
  const Branch branch = superlinear_method(search).branches[0];
  AnchorTable table(branch.search);
  EXPECT_THAT(table.offsets(11), ElementsAre(4, 9));
  EXPECT_THAT(table.offsets(2), ElementsAre());
  EXPECT_THAT(table.offsets(3), ElementsAre(4)) << "the anchor at token 0 counts";
  std::vector<int64_t> anchors;
  table.append_anchors(11, anchors);
  EXPECT_THAT(anchors, ElementsAre(3, 8));
  EXPECT_EQ(static_window(branch), 3);
}

TEST(Anchors, FirstOneIsJustBeforeTheWindow) {
  testing::Random random(1);
  for (int trial = 0; trial < 200; ++trial) {
    SpanSearch search = trial % 2 == 0 ? SpanSearch{} : released();
    search.first_stripe = random.between(0, 100);
    const Branch branch = superlinear_method(search).branches[0];
    const int64_t window = static_window(branch);
    const int64_t position = random.between(0, 100000);
    AnchorTable table(branch.search);
    std::vector<int64_t> anchors;
    table.append_anchors(position, anchors);
    EXPECT_EQ(anchors.empty(), position + 1 <= window) << "dense while t + 1 <= w";
    if (!anchors.empty()) {
      EXPECT_EQ(anchors.back(), position - window);
      EXPECT_GE(anchors.front(), 0);
      EXPECT_TRUE(std::is_sorted(anchors.begin(), anchors.end()));
      EXPECT_EQ(std::adjacent_find(anchors.begin(), anchors.end()), anchors.end());
    }
  }
}

TEST(Anchors, GrowingTableAgreesWithAFreshOne) {
  testing::Random random(2);
  const SearchSpec search = superlinear_method(released()).branches[0].search;
  AnchorTable grown(search);
  for (int trial = 0; trial < 50; ++trial) {
    const int64_t position = random.between(0, 2000000);
    AnchorTable fresh(search);
    const auto expected = fresh.offsets(position);
    const auto actual = grown.offsets(position);
    EXPECT_TRUE(std::equal(actual.begin(), actual.end(), expected.begin(), expected.end()));
  }
}

TEST(Anchors, TenMillionTokens) {
  // Near 10^7 single-precision powers are a token off; the doubles that decide here are checked
  // with long doubles wherever those are not in doubt themselves.
  const SearchSpec search = superlinear_method(released()).branches[0].search;
  AnchorTable table(search);
  const auto offsets = table.offsets(10'000'000 - 1);
  ASSERT_GT(offsets.size(), 6900U);
  for (size_t i = 0; i < offsets.size(); ++i) {
    const long double exact =
        std::pow(static_cast<long double>(i + 66), static_cast<long double>(20) / 11);
    if (std::abs(exact - std::round(exact)) > 1e-8L) {
      EXPECT_EQ(offsets[i], static_cast<int64_t>(exact)) << "stripe " << i + 66;
    }
  }
}

// Keys that neither the window nor any candidate span of a query covers.
int64_t num_uncovered(const SpanSearch& search, int64_t position) {
  const Branch branch = superlinear_method(search).branches[0];
  const int64_t window = static_window(branch);
  const SpanReach reach = span_reach(branch.selection, position);
  std::vector<bool> covered(static_cast<size_t>(position + 1), false);
  const auto cover = [&](Span span) {
    std::fill(covered.begin() + std::max<int64_t>(0, span.begin), covered.begin() + span.end, true);
  };
  cover({position + 1 - window, position + 1});
  AnchorTable table(branch.search);
  std::vector<int64_t> anchors;
  table.append_anchors(position, anchors);
  for (const int64_t anchor : anchors) {
    cover(span_around(reach, anchor, position, window));
  }
  return std::count(covered.begin(), covered.end(), false);
}

TEST(Spans, CoverEveryKeyWhenBackwardIsTwo) {
  testing::Random random(3);
  std::vector<int64_t> positions = {0, 1, 2, 3, 8, 9, 63, 64, 1 << 20};
  for (int trial = 0; trial < 200; ++trial) {
    positions.push_back(random.between(0, 20000));
  }
  for (const int64_t position : positions) {
    EXPECT_EQ(num_uncovered({}, position), 0) << position;
    EXPECT_EQ(num_uncovered(extended(), position), 0) << position;
    EXPECT_EQ(num_uncovered(released(), position), 0) << position;
  }
}

TEST(Spans, LeaveHolesWhenBackwardIsOne) {
  SpanSearch narrow;
  narrow.backward = {1, 1};
  EXPECT_GT(num_uncovered(narrow, 9999), 0);
  EXPECT_GT(num_uncovered(narrow, (1 << 20) - 1), 0);
}

TEST(Spans, AreCutAtTheContextTheQueryAndTheWindow) {
  const SpanReach reach{10, 5};
  EXPECT_EQ(span_around(reach, 50, 99, 20), (Span{40, 56}));
  EXPECT_EQ(span_around(reach, 4, 99, 20), (Span{0, 10}));
  EXPECT_EQ(span_around(reach, 79, 99, 20), (Span{69, 80})) << "the window starts at 80";
  EXPECT_EQ(span_around(reach, 99, 99, 0), (Span{89, 100})) << "no window";
}

TEST(Spans, LengthUsesThePowerItself) {
  // The authors' code: b N^q. Their readme's b N^(1-q) would give ceil(3 * 8192^0.45) = 174.
  SelectionSpec selection = superlinear_method(released()).branches[0].selection;
  EXPECT_EQ(span_reach(selection, 8191).backward, 427);
}

}  // namespace
}  // namespace longspan
