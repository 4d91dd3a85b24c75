// The reference backend's stages, page by page and shard by shard, against the reference pipeline,
// which knows neither. The pipeline itself is held to the papers by oracles/.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kernels/anchors.h"
#include "kernels/reference/backend.h"
#include "kernels/reference/pipeline.h"
#include "kernels/reference/selection.h"
#include "tests/support/cases.h"
#include "tests/support/compare.h"
#include "tests/support/methods.h"

namespace longspan {
namespace {

using testing::Case;
using testing::CaseTensors;
using ::testing::ElementsAre;
using testing::PagedTensor;
using testing::poisoned;
using testing::Random;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Case make_case(const Method& method, int64_t num_tokens, int64_t num_rows = 3) {
  Case test_case;
  test_case.name = "reference";
  test_case.num_query_heads = 6;
  test_case.num_kv_heads = 2;
  test_case.key_dim = 16;
  test_case.value_dim = 24;
  test_case.dtype = DataType::kFloat32;
  test_case.num_tokens = num_tokens;
  test_case.num_rows = num_rows;
  test_case.method = method;
  return test_case;
}

// A case with its numbers, its pipeline problem and the pages of its tokens.
struct Prepared {
  explicit Prepared(Case shape, uint64_t salt = 1) : test_case(std::move(shape)) {
    Random random(salt);
    tensors = testing::make_tensors(test_case, random);
    refresh();
  }
  // After `tensors` were changed.
  void refresh() {
    const int64_t first = test_case.first_position();
    positions.resize(static_cast<size_t>(test_case.num_rows));
    std::iota(positions.begin(), positions.end(), first);
    problem = {.method = &test_case.method,
               .num_query_heads = test_case.num_query_heads,
               .num_kv_heads = test_case.num_kv_heads,
               .key_dim = test_case.key_dim,
               .value_dim = test_case.value_dim,
               .kv_dtype = test_case.dtype,
               .scale = test_case.attention_scale(),
               .soft_cap = test_case.soft_cap,
               .num_tokens = test_case.num_tokens,
               .keys = tensors.keys.data(),
               .values = tensors.values.data(),
               .num_rows = test_case.num_rows,
               .positions = positions.data(),
               .query = tensors.query.data(),
               .search_query = tensors.search_query.data(),
               .gates = tensors.gates.data()};
    pages = PagedTensor(test_case.dtype,
                        test_case.num_kv_heads,
                        test_case.key_dim,
                        test_case.value_dim,
                        tensors.keys,
                        tensors.values);
  }

  Case test_case;
  CaseTensors tensors;
  std::vector<int64_t> positions;
  ReferenceProblem problem;
  PagedTensor pages;
};

std::unique_ptr<Backend> backend() { return make_reference_backend({}); }

// --- summarize ---

TEST(ReferenceSummarize, KeepsThePipelinesBits) {
  Random random(10);
  std::vector<SummarySpec> specs;
  for (const Method& method : testing::all_methods()) {
    for (const SummarySpec& spec : method.summaries()) {
      specs.push_back(spec);
    }
  }
  SummarySpec scaled{
      .kind = SummaryKind::kMean, .block_tokens = 32, .key_weights = {}, .value_weights = {}};
  scaled.scale_by_sqrt_length = true;
  specs.push_back(scaled);
  specs.push_back({.kind = SummaryKind::kCompressed,
                   .window_tokens = 32,
                   .stride_tokens = 16,
                   .key_weights = random.normals(32),
                   .value_weights = random.normals(32)});
  for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    Case shape = make_case(dense_method(), 330);
    shape.dtype = dtype;
    const Prepared prepared(shape);
    for (const SummarySpec& spec : specs) {
      const reference::Summaries expected = reference::summarize_tokens(prepared.problem, spec);
      const reference::Entries& entries = expected.entries;
      const int64_t first = 1;
      const int64_t count = spec.num_entries(330) - first;
      const int64_t shift = 5;
      PagedTensor out(dtype, 2, entries.key_dim, entries.value_dim, count + shift);
      Stream stream;
      ASSERT_TRUE(backend()
                      ->summarize({.spec = &spec,
                                   .tokens = prepared.pages.view(),
                                   .first_entry = first,
                                   .num_entries = count,
                                   .out = out.view(),
                                   .first_out = shift},
                                  stream)
                      .ok());
      for (int64_t i = 0; i < count; ++i) {
        for (int g = 0; g < 2; ++g) {
          for (int c = 0; c < entries.key_dim; ++c) {
            ASSERT_EQ(out.key(shift + i, g, c), entries.key(first + i, g)[c]);
          }
          for (int c = 0; c < entries.value_dim; ++c) {
            ASSERT_EQ(out.value(shift + i, g, c), entries.value(first + i, g)[c]);
          }
        }
      }
      EXPECT_TRUE(std::isnan(out.key(shift - 1, 1, 0))) << "nothing else is written";
    }
  }
}

TEST(ReferenceSummarize, ExtremesKeepTheFirstTokenUnlessOneIsBeyond) {
  Case shape = make_case(testing::quest_method(4, 1), 4, 1);
  Prepared prepared(shape);
  const auto set = [&](int channel, std::array<float, 4> column) {
    for (int64_t token = 0; token < 4; ++token) {
      prepared.pages.set_key(token, 0, channel, column[static_cast<size_t>(token)]);
    }
  };
  set(0, {kNan, 1, 2, 3});
  set(1, {1, kNan, 2, 0});
  set(2, {-kInfinity, 1, kInfinity, 0});
  PagedTensor out(DataType::kFloat32, 2, 16, 16, int64_t{1});
  Stream stream;
  ASSERT_TRUE(backend()
                  ->summarize({.spec = &shape.method.branches[0].summary,
                               .tokens = prepared.pages.view(),
                               .num_entries = 1,
                               .out = out.view()},
                              stream)
                  .ok());
  EXPECT_TRUE(std::isnan(out.key(0, 0, 0)) && std::isnan(out.value(0, 0, 0)));
  EXPECT_EQ(out.key(0, 0, 1), 0.0F);
  EXPECT_EQ(out.value(0, 0, 1), 2.0F);
  EXPECT_EQ(out.key(0, 0, 2), -kInfinity);
  EXPECT_EQ(out.value(0, 0, 2), kInfinity);
}

// --- search ---

// The places that a search fills, poisoned.
struct Found {
  Found(int64_t rows, int heads, int64_t max_k)
      : scores(poisoned(static_cast<size_t>(rows * heads * max_k))),
        ids(scores.size(), -77),
        max(max_k) {}
  void attach(SearchParams& params) {
    params.max_k = max;
    params.scores = scores.data();
    params.ids = ids.data();
  }
  std::vector<std::pair<float, int64_t>> list(int64_t index) const {
    std::vector<std::pair<float, int64_t>> result;
    for (int64_t i = index * max; i < (index + 1) * max; ++i) {
      result.emplace_back(scores[static_cast<size_t>(i)], ids[static_cast<size_t>(i)]);
    }
    return result;
  }
  std::vector<float> scores;
  std::vector<int64_t> ids;
  int64_t max;
};

TEST(ReferenceSearch, ImportanceWeighsWindowsByOverlap) {
  // Five windows of probability 16^-i overlap block 1 of 64 tokens: digits of the sum are weights.
  const Branch branch = testing::nsa_method(32, 16, 64, 4, 8).branches[1];
  const int num_windows = 12;
  std::vector<float> keys(num_windows, 0.0F);
  for (int i = 0; i < num_windows; ++i) {
    keys[static_cast<size_t>(i)] = std::log(std::pow(16.0F, static_cast<float>(i) - 3.0F));
  }
  const PagedTensor windows(DataType::kFloat32, 1, 1, 0, keys, {});
  const float query = 1.0F;
  const float lse = 0.0F;
  const int64_t begin = 1;
  const int64_t end = 2;
  const int64_t k = 1;
  int64_t visible = num_windows;
  SearchParams params{.spec = &branch.search,
                      .query = &query,
                      .num_rows = 1,
                      .num_query_heads = 1,
                      .view = windows.view(),
                      .candidate_begin = &begin,
                      .candidate_end = &end,
                      .summary = &branch.summary,
                      .block_tokens = 64,
                      .visible_entries = &visible,
                      .lse = &lse,
                      .halo = {},
                      .k = &k};
  Found found(1, 1, 2);
  found.attach(params);
  Stream stream;
  ASSERT_TRUE(backend()->search(params, stream).ok());
  EXPECT_NEAR(found.scores[0], 0x12221, 1) << "windows 3 to 7, weights 1, 2, 2, 2, 1";
  EXPECT_EQ(found.ids[0], 1);
  EXPECT_EQ(found.ids[1], -1);
  EXPECT_EQ(found.scores[1], -kInfinity);

  visible = 6;
  ASSERT_TRUE(backend()->search(params, stream).ok());
  EXPECT_NEAR(found.scores[0], 0x221, 0.01) << "windows 6 and 7 are not complete yet";
}

// What one rank of `num_ranks` holds of a branch's summaries under block-cyclic stripes.
struct Shard {
  std::vector<int64_t> blocks;   // global numbers of the local blocks
  std::vector<int64_t> entries;  // global numbers of the local entries
  PagedTensor view;
  PagedTensor halo;
};

PagedTensor gather(const reference::Summaries& summaries, const std::vector<int64_t>& entries) {
  const reference::Entries& all = summaries.entries;
  PagedTensor out(DataType::kFloat32,
                  all.num_kv_heads,
                  all.key_dim,
                  all.value_dim,
                  static_cast<int64_t>(entries.size()));
  for (size_t i = 0; i < entries.size(); ++i) {
    for (int g = 0; g < all.num_kv_heads && entries[i] >= 0; ++g) {
      for (int c = 0; c < all.key_dim; ++c) {
        out.set_key(static_cast<int64_t>(i), g, c, all.key(entries[i], g)[c]);
      }
      for (int c = 0; c < all.value_dim; ++c) {
        out.set_value(static_cast<int64_t>(i), g, c, all.value(entries[i], g)[c]);
      }
    }
  }
  return out;
}

Shard make_shard(const reference::Summaries& summaries,
                 const Branch& branch,
                 int64_t num_tokens,
                 int64_t stripe,
                 int rank,
                 int num_ranks) {
  const SummarySpec& spec = branch.summary;
  const int64_t block = branch.selection.block_tokens;
  const int64_t num_entries = spec.num_entries(num_tokens);
  const int64_t before = spec.span() / spec.stride() - 1;
  Shard shard;
  std::vector<int64_t> halo;
  for (int64_t start = rank * stripe; start < num_tokens; start += num_ranks * stripe) {
    const int64_t end = std::min(start + stripe, num_tokens);
    for (int64_t b = start / block; b * block < end; ++b) {
      shard.blocks.push_back(b);
    }
    for (int64_t e = start / spec.stride(); e * spec.stride() < end && e < num_entries; ++e) {
      shard.entries.push_back(e);
    }
    for (int64_t m = 0; m < before; ++m) {
      const int64_t entry = start / spec.stride() - before + m;
      halo.push_back(entry < num_entries ? entry : -1);
    }
  }
  shard.view = gather(summaries, shard.entries);
  shard.halo = gather(summaries, halo);
  return shard;
}

// Normalisers of NSA's importance over the windows named, [rows][H].
std::vector<float> normalisers(const Prepared& prepared,
                               const Branch& branch,
                               const reference::Summaries& summaries,
                               const std::vector<int64_t>& entries) {
  const int group = prepared.test_case.num_query_heads / prepared.test_case.num_kv_heads;
  std::vector<float> lse;
  for (int64_t row = 0; row < prepared.test_case.num_rows; ++row) {
    const int64_t visible =
        branch.summary.num_entries(prepared.positions[static_cast<size_t>(row)] + 1);
    for (int head = 0; head < prepared.test_case.num_query_heads; ++head) {
      const float* query =
          prepared.problem.query +
          (row * prepared.test_case.num_query_heads + head) * prepared.test_case.key_dim;
      double sum = 0.0;
      for (const int64_t entry : entries) {
        if (entry < visible) {
          sum += std::exp(reference::logit(
              prepared.problem, query, summaries.entries.key(entry, head / group)));
        }
      }
      lse.push_back(static_cast<float>(std::log(sum)));
    }
  }
  return lse;
}

// Top k of every row and selection head over all shards: local searches, then the total order over
// global numbers. `local_lse`: each shard normalises by itself, which is wrong.
std::vector<std::vector<int64_t>> search_shards(const Prepared& prepared,
                                                const Branch& branch,
                                                int num_ranks,
                                                int64_t stripe,
                                                int64_t k,
                                                bool local_lse = false) {
  const Case& shape = prepared.test_case;
  const auto summaries = reference::summarize_tokens(prepared.problem, branch.summary);
  const auto rows = static_cast<size_t>(shape.num_rows);
  const int heads = num_selection_heads(branch.search, shape.num_query_heads, shape.num_kv_heads);
  std::vector<std::vector<std::pair<float, int64_t>>> merged(rows * static_cast<size_t>(heads));
  for (int rank = 0; rank < num_ranks; ++rank) {
    const Shard shard = make_shard(summaries, branch, shape.num_tokens, stripe, rank, num_ranks);
    std::vector<int64_t> all(static_cast<size_t>(branch.summary.num_entries(shape.num_tokens)));
    std::iota(all.begin(), all.end(), 0);
    const std::vector<float> lse =
        normalisers(prepared, branch, summaries, local_lse ? shard.entries : all);
    std::vector<int64_t> begin, end, visible;
    const auto count_below = [](const std::vector<int64_t>& numbers, int64_t bound) {
      return std::lower_bound(numbers.begin(), numbers.end(), bound) - numbers.begin();
    };
    for (const int64_t position : prepared.positions) {
      const int64_t own = position / branch.selection.block_tokens;
      begin.push_back(count_below(shard.blocks, branch.selection.forced_first_blocks));
      end.push_back(std::max(
          begin.back(), count_below(shard.blocks, own - branch.selection.forced_last_blocks + 1)));
      visible.push_back(count_below(shard.entries, branch.summary.num_entries(position + 1)));
    }
    const std::vector<int64_t> budgets(rows, k);
    SearchParams params{.spec = &branch.search,
                        .query = prepared.problem.query,
                        .num_rows = shape.num_rows,
                        .num_query_heads = shape.num_query_heads,
                        .scale = shape.attention_scale(),
                        .view = shard.view.view(),
                        .candidate_begin = begin.data(),
                        .candidate_end = end.data(),
                        .summary = &branch.summary,
                        .block_tokens = branch.selection.block_tokens,
                        .visible_entries = visible.data(),
                        .lse = lse.data(),
                        .halo = shard.halo.view(),
                        .stripe_tokens = stripe,
                        .starts_context = rank == 0,
                        .k = budgets.data()};
    Found found(shape.num_rows, heads, k);
    found.attach(params);
    Stream stream;
    EXPECT_TRUE(backend()->search(params, stream).ok());
    for (size_t list = 0; list < merged.size(); ++list) {
      for (const auto& [score, id] : found.list(static_cast<int64_t>(list))) {
        if (id >= 0) {
          merged[list].emplace_back(-score, shard.blocks[static_cast<size_t>(id)]);
        }
      }
    }
  }
  std::vector<std::vector<int64_t>> winners;
  for (auto& list : merged) {
    std::sort(list.begin(), list.end());
    list.resize(std::min<size_t>(list.size(), static_cast<size_t>(k)));
    std::vector<int64_t>& ids = winners.emplace_back();
    for (const auto& [score, id] : list) {
      ids.push_back(id);
    }
    std::sort(ids.begin(), ids.end());
  }
  return winners;
}

// The scored blocks of the pipeline, by row and selection head. Rows whose choice hangs on less
// than rounding are emptied in both.
std::vector<std::vector<int64_t>> pipeline_choice(const Prepared& prepared,
                                                  size_t branch_index,
                                                  std::vector<std::vector<int64_t>>& other) {
  const Case& shape = prepared.test_case;
  const ReferenceResult result = run_reference(prepared.problem);
  const Branch& branch = shape.method.branches[branch_index];
  const int heads = num_selection_heads(branch.search, shape.num_query_heads, shape.num_kv_heads);
  std::vector<std::vector<int64_t>> choice;
  for (int64_t row = 0; row < shape.num_rows; ++row) {
    for (int list = 0; list < heads; ++list) {
      const int64_t head = int64_t{list} * shape.num_query_heads / heads;
      const auto index =
          static_cast<size_t>((row * shape.num_query_heads + head) *
                                  static_cast<int64_t>(shape.method.branches.size()) +
                              static_cast<int64_t>(branch_index));
      std::vector<int64_t>& ids = choice.emplace_back();
      for (const ReferenceSelected& block : result.selections[index].selected) {
        if (!block.forced) {
          ids.push_back(block.id);
        }
      }
      if (result.selections[index].margin < 1e-6) {
        ids.clear();
        other[choice.size() - 1].clear();
      }
    }
  }
  return choice;
}

struct Sharding {
  int num_ranks;
  int64_t stripe;
};

class ReferenceSearchSharded : public ::testing::TestWithParam<Sharding> {};

TEST_P(ReferenceSearchSharded, EqualsThePipeline) {
  Random random(20);
  std::vector<Method> methods = testing::all_methods();
  methods.push_back(testing::nsa_method(64, 16, 64, 5, 96));  // three windows reach into a stripe
  methods.push_back(testing::nsa_method(16, 4, 32, 5, 96));
  for (const Method& method : methods) {
    const size_t index = method.branches.size() == 3 ? 1 : 0;
    const Branch& branch = method.branches[index];
    if (!branch.needs_search() || branch.selection.spans) {
      continue;
    }
    for (const int64_t num_tokens : {random.between(900, 1500), random.between(65, 400)}) {
      Case shape = make_case(method, num_tokens, 5);
      const Prepared prepared(shape, static_cast<uint64_t>(num_tokens));
      const int64_t budget = static_cast<int64_t>(branch.budget.decode.value);
      const int64_t forced =
          branch.selection.forced_within_budget
              ? branch.selection.forced_first_blocks + branch.selection.forced_last_blocks
              : 0;
      if (num_tokens < 400 && forced > 1) {
        continue;  // short contexts have fewer forced blocks
      }
      auto found =
          search_shards(prepared, branch, GetParam().num_ranks, GetParam().stripe, budget - forced);
      const auto expected = pipeline_choice(prepared, index, found);
      EXPECT_EQ(found, expected) << shape;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shards,
                         ReferenceSearchSharded,
                         ::testing::Values(Sharding{1, 4096},
                                           Sharding{1, 128},
                                           Sharding{2, 64},
                                           Sharding{3, 128},
                                           Sharding{5, 192}),
                         [](const auto& test) {
                           return std::to_string(test.param.num_ranks) + "RanksOf" +
                                  std::to_string(test.param.stripe);
                         });

TEST(ReferenceSearch, LocalNormalisersRankOtherwise) {
  Case shape = make_case(testing::nsa_method(32, 16, 64, 6, 96), 1500, 40);
  Prepared prepared(shape);
  for (float& element : prepared.tensors.query) {
    element *= 2.0F;
  }
  prepared.refresh();
  const Branch& branch = shape.method.branches[1];
  auto global = search_shards(prepared, branch, 3, 128, 3);
  const auto expected = pipeline_choice(prepared, 1, global);
  EXPECT_EQ(global, expected);
  EXPECT_NE(search_shards(prepared, branch, 3, 128, 3, /*local_lse=*/true), expected)
      << "the test data would show ranking on a shard's own normaliser";
}

TEST(ReferenceSearch, AnchorsEqualThePipeline) {
  for (const size_t which : {7, 8}) {
    const Method method = testing::all_methods()[which];
    const Branch& branch = method.branches[0];
    ASSERT_TRUE(branch.selection.spans);
    const Prepared prepared(make_case(method, 900, 4));
    AnchorTable table(branch.search);
    std::vector<int64_t> candidates;
    std::vector<int64_t> offsets = {0};
    for (const int64_t position : prepared.positions) {
      table.append_anchors(position, candidates);
      offsets.push_back(static_cast<int64_t>(candidates.size()));
    }
    const std::vector<int64_t> k(4, static_cast<int64_t>(branch.budget.decode.value));
    SearchParams params{.spec = &branch.search,
                        .query = prepared.problem.search_query,
                        .num_rows = 4,
                        .num_query_heads = 6,
                        .view = prepared.pages.view(),
                        .candidates = candidates.data(),
                        .candidate_offsets = offsets.data(),
                        .halo = {},
                        .k = k.data()};
    Found found(4, 6, k[0]);
    found.attach(params);
    Stream stream;
    ASSERT_TRUE(backend()->search(params, stream).ok());
    const ReferenceResult result = run_reference(prepared.problem);
    for (size_t list = 0; list < 24; ++list) {
      const auto pairs = found.list(static_cast<int64_t>(list));
      ASSERT_EQ(pairs.size(), result.selections[list].selected.size());
      for (size_t i = 0; i < pairs.size(); ++i) {
        EXPECT_EQ(pairs[i].second, result.selections[list].selected[i].id);
        EXPECT_FLOAT_EQ(pairs[i].first,
                        static_cast<float>(result.selections[list].selected[i].score));
      }
    }
  }
}

TEST(ReferenceSearch, OrdersTiesNansAndInfinities) {
  const Branch branch = testing::moba_method(64, 3).branches[0];
  const std::vector<float> scores = {1, kNan, 2, -kInfinity, 2, kInfinity, 1, 1};
  const PagedTensor means(DataType::kFloat32, 1, 1, 0, scores, {});
  const float query = 1.0F;
  const int64_t begin = 0;
  const int64_t end = 8;
  int64_t k = 8;
  SearchParams params{.spec = &branch.search,
                      .query = &query,
                      .num_rows = 1,
                      .num_query_heads = 1,
                      .view = means.view(),
                      .candidate_begin = &begin,
                      .candidate_end = &end,
                      .halo = {},
                      .k = &k};
  Found all(1, 1, 10);
  all.attach(params);
  Stream stream;
  ASSERT_TRUE(backend()->search(params, stream).ok());
  EXPECT_THAT(all.ids, ElementsAre(5, 2, 4, 0, 6, 7, 1, 3, -1, -1));
  EXPECT_EQ(all.scores[6], -kInfinity) << "a NaN is the lowest score";

  k = 0;
  ASSERT_TRUE(backend()->search(params, stream).ok());
  EXPECT_THAT(all.ids, ::testing::Each(-1));
}

}  // namespace
}  // namespace longspan
