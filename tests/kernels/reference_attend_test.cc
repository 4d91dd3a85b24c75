// The reference backend's attend and merge against the reference pipeline and their own algebra.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kernels/reference/backend.h"
#include "kernels/reference/pipeline.h"
#include "tests/support/cases.h"
#include "tests/support/compare.h"
#include "tests/support/methods.h"

namespace longspan {
namespace {

using testing::Case;
using ::testing::Each;
using ::testing::ElementsAre;
using testing::PagedTensor;
using testing::poisoned;
using testing::Random;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::unique_ptr<Backend> backend() { return make_reference_backend({}); }

void attend(const AttendParams& params) {
  Stream stream;
  ASSERT_TRUE(backend()->attend(params, stream).ok());
}

void merge(const MergeParams& params) {
  Stream stream;
  ASSERT_TRUE(backend()->merge(params, stream).ok());
}

// --- attend ---

TEST(ReferenceAttend, EqualsThePipelineOnItsSelections) {
  Random random(30);
  for (const Method& method : testing::all_methods()) {
    if (!method.has_lse()) {
      continue;
    }
    for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
      Case shape{.name = "attend",
                 .num_query_heads = 6,
                 .num_kv_heads = 3,
                 .key_dim = 24,
                 .value_dim = 16,
                 .dtype = dtype,
                 .num_tokens = random.between(1, 700),
                 .method = method};
      shape.num_rows = random.between(1, std::min<int64_t>(4, shape.num_tokens));
      shape.soft_cap = random.chance(0.5) ? 3.0F : 0.0F;
      const auto tensors = testing::make_tensors(shape, random);
      const PagedTensor pages(dtype, 3, 24, 16, tensors.keys, tensors.values);
      std::vector<int64_t> positions(static_cast<size_t>(shape.num_rows));
      std::iota(positions.begin(), positions.end(), shape.first_position());
      const ReferenceResult expected = run_reference({.method = &shape.method,
                                                      .num_query_heads = 6,
                                                      .num_kv_heads = 3,
                                                      .key_dim = 24,
                                                      .value_dim = 16,
                                                      .kv_dtype = dtype,
                                                      .scale = shape.attention_scale(),
                                                      .soft_cap = shape.soft_cap,
                                                      .num_tokens = shape.num_tokens,
                                                      .keys = tensors.keys.data(),
                                                      .values = tensors.values.data(),
                                                      .num_rows = shape.num_rows,
                                                      .positions = positions.data(),
                                                      .query = tensors.query.data()});
      std::vector<int64_t> offsets = {0};
      std::vector<Span> spans;
      for (const ReferenceSelection& selection : expected.selections) {
        spans.insert(spans.end(), selection.tokens.begin(), selection.tokens.end());
        offsets.push_back(static_cast<int64_t>(spans.size()));
      }
      auto out = poisoned(expected.out.size());
      auto lse = poisoned(expected.lse.size());
      attend({.query = tensors.query.data(),
              .num_rows = shape.num_rows,
              .num_query_heads = 6,
              .kv = pages.view(),
              .num_selection_heads = 6,
              .span_offsets = offsets.data(),
              .spans = spans.data(),
              .scale = shape.attention_scale(),
              .soft_cap = shape.soft_cap,
              .out = out.data(),
              .lse = lse.data()});
      const testing::Tolerance rounding{1e-6, 1e-5};
      EXPECT_TRUE(testing::outputs_match(out, expected.out, 16, rounding)) << shape;
      EXPECT_TRUE(testing::lse_match(lse, expected.lse, rounding)) << shape;
    }
  }
}

// One KV head of one channel: key and value of a token are numbers, the query is 1.
struct Column {
  explicit Column(const std::vector<float>& keys, const std::vector<float>& values)
      : pages(DataType::kFloat32, 1, 1, 1, keys, values) {}

  // {out, lse} of one row over `spans`.
  std::pair<float, float> attend_to(const std::vector<Span>& spans) const {
    const float query = 1.0F;
    const std::vector<int64_t> offsets = {0, static_cast<int64_t>(spans.size())};
    auto out = poisoned(1);
    auto lse = poisoned(1);
    attend({.query = &query,
            .num_rows = 1,
            .num_query_heads = 1,
            .kv = pages.view(),
            .span_offsets = offsets.data(),
            .spans = spans.data(),
            .out = out.data(),
            .lse = lse.data()});
    return {out[0], lse[0]};
  }
  PagedTensor pages;
};

TEST(ReferenceAttend, EmptyRows) {
  const Column column({1, -kInfinity}, {5, 7});
  EXPECT_EQ(column.attend_to({}), std::make_pair(0.0F, -kInfinity));
  EXPECT_EQ(column.attend_to({{1, 1}}), std::make_pair(0.0F, -kInfinity));
  EXPECT_EQ(column.attend_to({{1, 2}}), std::make_pair(0.0F, -kInfinity)) << "no weight at all";
  EXPECT_EQ(column.attend_to({{0, 2}}), std::make_pair(5.0F, 1.0F));
}

TEST(ReferenceAttend, NansShow) {
  const Column column({1, kNan, kInfinity, -kInfinity, kNan}, {1, 2, 3, 4, 5});
  for (const std::vector<Span>& spans :
       {std::vector<Span>{{0, 2}}, {{1, 2}}, {{0, 1}, {2, 3}}, {{3, 5}}}) {
    const auto [out, lse] = column.attend_to(spans);
    EXPECT_TRUE(std::isnan(out) && std::isnan(lse)) << spans[0].begin;
  }
}

TEST(ReferenceAttend, LargeLogitsDoNotOverflow) {
  const Column column({1e30F, 1e30F, 0}, {2, 4, 100});
  EXPECT_EQ(column.attend_to({{0, 3}}), std::make_pair(3.0F, 1e30F));
}

TEST(ReferenceAttend, HeadsRowsAndOptionalOutput) {
  // Two queries, four virtual rows; six query heads share two lists; only lse is wanted at last.
  Random random(31);
  const auto query = random.normals(2 * 6 * 8);
  const PagedTensor pages(
      DataType::kFloat32, 3, 8, 4, random.normals(100 * 3 * 8), random.normals(100 * 3 * 4));
  const std::vector<int64_t> row_query = {1, 0, 1, 1};
  std::vector<int64_t> offsets = {0};
  std::vector<Span> spans;
  for (int64_t list = 0; list < 8; ++list) {
    spans.push_back({list, list + 10});
    spans.push_back({50 + list, 90});
    offsets.push_back(static_cast<int64_t>(spans.size()));
  }
  AttendParams params{.query = query.data(),
                      .row_query = row_query.data(),
                      .num_rows = 4,
                      .num_query_heads = 6,
                      .kv = pages.view(),
                      .num_selection_heads = 2,
                      .span_offsets = offsets.data(),
                      .spans = spans.data(),
                      .scale = 0.5F};
  auto out = poisoned(4 * 6 * 4);
  auto lse = poisoned(4 * 6);
  params.out = out.data();
  params.lse = lse.data();
  attend(params);
  auto only_lse = poisoned(4 * 6);
  params.out = nullptr;
  params.lse = only_lse.data();
  attend(params);
  EXPECT_EQ(lse, only_lse);

  for (int64_t row = 0; row < 4; ++row) {
    for (int head = 0; head < 6; ++head) {
      const int64_t list = row * 2 + head / 3;
      double sum = 0.0;
      for (int64_t token = 0; token < 100; ++token) {
        if ((token >= list && token < list + 10) || (token >= 50 + list && token < 90)) {
          double dot = 0.0;
          for (int c = 0; c < 8; ++c) {
            const auto index =
                static_cast<size_t>((row_query[static_cast<size_t>(row)] * 6 + head) * 8 + c);
            dot += static_cast<double>(query[index]) * pages.key(token, head / 2, c);
          }
          sum += std::exp(dot * 0.5);
        }
      }
      EXPECT_NEAR(lse[static_cast<size_t>(row * 6 + head)], std::log(sum), 1e-5);
    }
  }
}

// --- merge ---

struct Part {
  std::vector<float> out;
  std::vector<float> lse;
};

Part random_part(Random& random, int64_t rows, int64_t dim) {
  return {random.normals(static_cast<size_t>(rows * dim)),
          random.normals(static_cast<size_t>(rows), 5.0F)};
}

Part merged(const std::vector<Part>& parts, int dim, const float* sinks = nullptr) {
  std::vector<const float*> outs;
  std::vector<const float*> lses;
  outs.reserve(parts.size());
  lses.reserve(parts.size());
  for (const Part& part : parts) {
    outs.push_back(part.out.data());
    lses.push_back(part.lse.data());
  }
  Part result{poisoned(parts[0].out.size()), poisoned(parts[0].lse.size())};
  merge({.num_parts = static_cast<int>(parts.size()),
         .part_out = outs.data(),
         .part_lse = lses.data(),
         .sink_logits = sinks,
         .num_rows = static_cast<int64_t>(parts[0].lse.size()),
         .value_dim = dim,
         .out = result.out.data(),
         .lse = result.lse.data()});
  return result;
}

TEST(ReferenceMerge, IsAssociativeAndIgnoresOrder) {
  Random random(40);
  std::vector<Part> parts;
  parts.reserve(24);
  for (int i = 0; i < 24; ++i) {
    parts.push_back(random_part(random, 7, 5));
  }
  const Part at_once = merged(parts, 5);
  std::shuffle(parts.begin(), parts.end(), random.engine());
  Part running = parts[0];
  for (size_t i = 1; i < parts.size(); ++i) {
    running = merged({running, parts[i]}, 5);
  }
  EXPECT_TRUE(
      testing::outputs_match(running.out, std::span<const float>(at_once.out), 5, {1e-5, 1e-5}));
  EXPECT_TRUE(testing::lse_match(running.lse, std::span<const float>(at_once.lse), {1e-5, 1e-5}));
}

TEST(ReferenceMerge, EmptyPartsWeighNothing) {
  Random random(41);
  const Part part = random_part(random, 6, 5);
  const Part empty{std::vector<float>(30, 0.0F), std::vector<float>(6, -kInfinity)};
  const Part garbage{poisoned(30), std::vector<float>(6, -kInfinity)};
  const Part result = merged({empty, part, garbage}, 5);
  EXPECT_THAT(result.out, ::testing::Pointwise(::testing::FloatEq(), part.out));
  EXPECT_THAT(result.lse, ::testing::Pointwise(::testing::FloatEq(), part.lse));
  const Part nothing = merged({empty, garbage}, 5);
  EXPECT_THAT(nothing.out, Each(0.0F));
  EXPECT_THAT(nothing.lse, Each(-kInfinity));
}

TEST(ReferenceMerge, SinksJoinOnceWithAZeroValue) {
  const Part part{{4.0F}, {0.0F}};
  const float sink = std::log(3.0F);
  const Part result = merged({part}, 1, &sink);
  EXPECT_FLOAT_EQ(result.out[0], 1.0F);
  EXPECT_FLOAT_EQ(result.lse[0], std::log(4.0F));
  const Part empty{{0.0F}, {-kInfinity}};
  EXPECT_FLOAT_EQ(merged({empty}, 1, &sink).lse[0], sink);
  EXPECT_EQ(merged({empty}, 1, &sink).out[0], 0.0F);
}

TEST(ReferenceMerge, NansShow) {
  for (const float lse : {kNan, kInfinity}) {
    const Part result = merged({{{1.0F}, {2.0F}}, {{3.0F}, {lse}}}, 1);
    EXPECT_TRUE(std::isnan(result.out[0]) && std::isnan(result.lse[0]));
  }
}

TEST(ReferenceMerge, WeightsArePlainSumsAndLeaveLseAlone) {
  const std::vector<float> a = {1, 2, 3, 4};
  const std::vector<float> b = {10, 20, 30, 40};
  const std::vector<float> weight_a = {2, 0};
  const std::vector<float> weight_b = {0.5F, -1};
  const std::vector<const float*> outs = {a.data(), b.data()};
  const std::vector<const float*> weights = {weight_a.data(), weight_b.data()};
  auto out = poisoned(4);
  std::vector<float> lse = {123.0F, 456.0F};
  merge({.num_parts = 2,
         .part_out = outs.data(),
         .weights = weights.data(),
         .num_rows = 2,
         .value_dim = 2,
         .out = out.data(),
         .lse = lse.data()});
  EXPECT_THAT(out, ElementsAre(7, 14, -30, -40));
  EXPECT_THAT(lse, ElementsAre(123.0F, 456.0F));
}

TEST(ReferenceMerge, MayWriteOverItsFirstPart) {
  Random random(42);
  Part first = random_part(random, 6, 5);
  const Part second = random_part(random, 6, 5);
  const Part expected = merged({first, second}, 5);
  const std::vector<const float*> outs = {first.out.data(), second.out.data()};
  const std::vector<const float*> lses = {first.lse.data(), second.lse.data()};
  merge({.num_parts = 2,
         .part_out = outs.data(),
         .part_lse = lses.data(),
         .num_rows = 6,
         .value_dim = 5,
         .out = first.out.data(),
         .lse = first.lse.data()});
  EXPECT_EQ(first.out, expected.out);
  EXPECT_EQ(first.lse, expected.lse);
}

}  // namespace
}  // namespace longspan
