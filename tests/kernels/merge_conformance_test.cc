// Summarize and merge: every target against the reference.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

#include "base/checked.h"
#include "kernels/backend.h"
#include "tests/kernels/conformance.h"

namespace longspan::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr DataType kDtypes[] = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16};

class SummarizeConformance : public Conformance {
 protected:
  // Whole pages are compared, so what must not be written is seen too.
  void check(const SummarySpec& spec, DataType dtype, int key_dim, Random& random) const {
    const int num_kv_heads = 2;
    const int value_dim = 40;
    const int64_t num_tokens = 3 * spec.span() + 100;
    std::vector<float> keys = random.normals(static_cast<size_t>(num_tokens) * num_kv_heads *
                                             static_cast<size_t>(key_dim));
    keys[keys.size() / 2] = kNan;
    keys[keys.size() / 3] = kInfinity;
    keys[0] = kNan;
    const std::vector<float> values =
        random.normals(static_cast<size_t>(num_tokens) * num_kv_heads * value_dim);
    const PagedTensor tokens(dtype, num_kv_heads, key_dim, value_dim, keys, values);
    const int out_value_dim = spec.kind == SummaryKind::kMinMax       ? key_dim
                              : spec.kind == SummaryKind::kCompressed ? value_dim
                                                                      : 0;
    SummarizeParams params;
    params.spec = &spec;
    params.tokens = tokens.view();
    params.first_entry = 1;
    params.num_entries = spec.num_entries(num_tokens) - 1;
    params.first_out = 62;  // across a page boundary
    const int64_t num_out = params.first_out + params.num_entries;
    PagedTensor actual(dtype, num_kv_heads, key_dim, out_value_dim, num_out);
    PagedTensor expected(dtype, num_kv_heads, key_dim, out_value_dim, num_out);
    Stream stream;
    params.out = actual.view();
    ASSERT_TRUE(backend(2)->summarize(params, stream).ok());
    params.out = expected.view();
    ASSERT_TRUE(reference()->summarize(params, stream).ok());
    for (int64_t page = 0; page < divide_up(num_out, kPageTokens); ++page) {
      EXPECT_EQ(
          std::memcmp(
              actual.view().pages[page], expected.view().pages[page], actual.view().page_bytes()),
          0)
          << "kind " << static_cast<int>(spec.kind) << ", span " << spec.span() << ", "
          << to_string(dtype) << ", dim " << key_dim << ", page " << page << ", seed "
          << test_seed();
    }
  }
};

TEST_P(SummarizeConformance, HasTheBitsOfTheReference) {
  Random numbers = random(1);
  std::vector<SummarySpec> specs;
  SummarySpec blocks;
  for (const SummaryKind kind : {SummaryKind::kMean, SummaryKind::kMinMax}) {
    for (const int block : {1, 16, 64, 256}) {
      blocks.kind = kind;
      blocks.block_tokens = block;
      specs.push_back(blocks);
    }
  }
  blocks.kind = SummaryKind::kMean;
  blocks.scale_by_sqrt_length = true;
  specs.push_back(blocks);
  for (const int stride : {16, 32, 64}) {
    SummarySpec windows;
    windows.kind = SummaryKind::kCompressed;
    windows.window_tokens = 64;
    windows.stride_tokens = stride;
    specs.push_back(windows);
    windows.key_weights = numbers.normals(64);
    specs.push_back(windows);
    windows.value_weights = numbers.normals(64);
    specs.push_back(windows);
  }
  for (const SummarySpec& spec : specs) {
    for (const DataType dtype : kDtypes) {
      for (const int key_dim : {64, 24}) {
        check(spec, dtype, key_dim, numbers);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, SummarizeConformance, kAllTargets, target_name);

struct MergeSetup {
  int64_t num_rows = 0;
  int value_dim = 0;
  std::vector<std::vector<float>> outs;
  std::vector<std::vector<float>> lses;
  std::vector<std::vector<float>> weights;  // empty: by lse
  std::vector<float> sinks;                 // empty: none
};

MergeSetup make_merge(int num_parts, int64_t num_rows, int value_dim, Random& random) {
  MergeSetup setup;
  setup.num_rows = num_rows;
  setup.value_dim = value_dim;
  for (int part = 0; part < num_parts; ++part) {
    setup.outs.push_back(random.normals(static_cast<size_t>(num_rows * value_dim)));
    setup.lses.push_back(random.normals(static_cast<size_t>(num_rows), 5.0F));
    for (int64_t row = 0; row < num_rows; ++row) {
      if (random.chance(0.3)) {  // an empty part, whose output nobody wrote
        setup.lses.back()[static_cast<size_t>(row)] = -kInfinity;
        std::fill_n(setup.outs.back().begin() + row * value_dim, value_dim, kNan);
      }
    }
  }
  return setup;
}

struct MergeOutput {
  std::vector<float> out;
  std::vector<float> lse;
};

MergeOutput merge_with(Backend& backend, MergeSetup setup, bool in_place) {
  MergeOutput result{poisoned(static_cast<size_t>(setup.num_rows * setup.value_dim)),
                     poisoned(static_cast<size_t>(setup.num_rows))};
  std::vector<const float*> outs;
  std::vector<const float*> lses;
  std::vector<const float*> weights;
  for (size_t part = 0; part < setup.outs.size(); ++part) {
    outs.push_back(setup.outs[part].data());
    lses.push_back(setup.lses[part].data());
  }
  for (const auto& weight : setup.weights) {
    weights.push_back(weight.data());
  }
  MergeParams params;
  params.num_parts = static_cast<int>(outs.size());
  params.part_out = outs.data();
  params.part_lse = lses.data();
  params.weights = weights.empty() ? nullptr : weights.data();
  params.sink_logits = setup.sinks.empty() ? nullptr : setup.sinks.data();
  params.num_rows = setup.num_rows;
  params.value_dim = setup.value_dim;
  params.out = in_place ? setup.outs[0].data() : result.out.data();
  params.lse = in_place ? setup.lses[0].data() : result.lse.data();
  Stream stream;
  EXPECT_TRUE(backend.merge(params, stream).ok());
  if (in_place) {
    return {setup.outs[0], setup.lses[0]};
  }
  return result;
}

class MergeConformance : public Conformance {
 protected:
  void check(const MergeSetup& setup) const {
    const Tolerance limits = tolerance(DataType::kFloat32);
    const MergeOutput expected = merge_with(*reference(), setup, /*in_place=*/false);
    for (const bool in_place : {false, true}) {
      const MergeOutput actual = merge_with(*backend(2), setup, in_place);
      EXPECT_TRUE(
          outputs_match(actual.out, expected.out, static_cast<size_t>(setup.value_dim), limits))
          << setup.outs.size() << " parts, seed " << test_seed();
      if (setup.weights.empty()) {
        EXPECT_TRUE(lse_match(actual.lse, expected.lse, limits)) << setup.outs.size() << " parts";
      }
    }
  }
};

TEST_P(MergeConformance, PartsEmptyPartsAndSinks) {
  Random numbers = random(2);
  for (const int num_parts : {1, 2, 3, 31, 32, 33, 70}) {
    for (const int value_dim : {1, 8, 80, 129}) {
      MergeSetup setup = make_merge(num_parts, 300, value_dim, numbers);
      check(setup);
      setup.sinks = numbers.normals(300);
      setup.sinks[7] = -kInfinity;
      check(setup);
    }
  }
}

TEST_P(MergeConformance, Weights) {
  Random numbers = random(3);
  for (const int num_parts : {1, 3, 40}) {
    MergeSetup setup = make_merge(num_parts, 20, 64, numbers);
    for (int part = 0; part < num_parts; ++part) {
      setup.outs[static_cast<size_t>(part)] = numbers.normals(size_t{20} * 64);
      setup.weights.push_back(numbers.normals(20));
    }
    check(setup);
  }
}

TEST_P(MergeConformance, NanInAnLseReachesTheRowAndNoOther) {
  Random numbers = random(4);
  MergeSetup setup = make_merge(3, 10, 16, numbers);
  setup.lses[1][4] = kNan;
  check(setup);
}

// Merging in any order and grouping is the same up to rounding.
TEST_P(MergeConformance, IsAssociative) {
  Random numbers = random(5);
  const MergeSetup all = make_merge(5, 50, 64, numbers);
  const auto simd = backend(1);
  const MergeOutput at_once = merge_with(*simd, all, false);
  MergeSetup first = all;
  first.outs.resize(2);
  first.lses.resize(2);
  MergeSetup rest = all;
  rest.outs.erase(rest.outs.begin(), rest.outs.begin() + 2);
  rest.lses.erase(rest.lses.begin(), rest.lses.begin() + 2);
  const MergeOutput left = merge_with(*simd, first, false);
  const MergeOutput right = merge_with(*simd, rest, false);
  MergeSetup halves;
  halves.num_rows = 50;
  halves.value_dim = 64;
  halves.outs = {right.out, left.out};
  halves.lses = {right.lse, left.lse};
  const MergeOutput in_halves = merge_with(*simd, halves, false);
  EXPECT_TRUE(outputs_match(in_halves.out, at_once.out, 64, tolerance(DataType::kFloat32)));
  EXPECT_TRUE(lse_match(in_halves.lse, at_once.lse, tolerance(DataType::kFloat32)));
}

INSTANTIATE_TEST_SUITE_P(Targets, MergeConformance, kAllTargets, target_name);

}  // namespace
}  // namespace longspan::testing
