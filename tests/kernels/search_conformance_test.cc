// Search: every target against the reference. Small whole numbers make all
// scores exact and many of them equal, so there the selection must be the same id by id; with
// random numbers it may differ only where scores tie within fp32 rounding.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/backend.h"
#include "tests/kernels/conformance.h"

namespace longspan::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr DataType kDtypes[] = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16};

struct SearchSetup {
  SearchSpec spec;
  SummarySpec summary;
  int num_query_heads = 0;
  int64_t num_rows = 0;
  std::vector<float> query;
  PagedTensor view;
  PagedTensor halo;
  bool has_halo = false;
  int64_t stripe_tokens = 0;
  bool starts_context = true;
  int block_tokens = 0;
  std::vector<int64_t> begin, end;  // of candidate blocks
  std::vector<int64_t> anchors, anchor_offsets;
  std::vector<int64_t> visible;
  std::vector<float> lse;
  float scale = 1.0F;
  float soft_cap = 0.0F;
  std::vector<int64_t> k;
  int64_t max_k = 0;

  int num_lists() const {
    return num_selection_heads(spec, num_query_heads, view.view().num_kv_heads);
  }
};

struct SearchOutput {
  std::vector<float> scores;
  std::vector<int64_t> ids;
};

SearchOutput search_with(Backend& backend,
                         const SearchSetup& setup,
                         const std::vector<int64_t>& k,
                         int64_t max_k) {
  const auto places = static_cast<size_t>(setup.num_rows * setup.num_lists() * max_k);
  SearchOutput result{poisoned(places), std::vector<int64_t>(places, -77)};
  SearchParams params;
  params.spec = &setup.spec;
  params.query = setup.query.data();
  params.num_rows = setup.num_rows;
  params.num_query_heads = setup.num_query_heads;
  params.scale = setup.scale;
  params.soft_cap = setup.soft_cap;
  params.view = setup.view.view();
  params.candidate_begin = setup.begin.data();
  params.candidate_end = setup.end.data();
  params.candidates = setup.anchors.data();
  params.candidate_offsets = setup.anchor_offsets.data();
  params.summary = &setup.summary;
  params.block_tokens = setup.block_tokens;
  params.visible_entries = setup.visible.data();
  params.lse = setup.lse.data();
  if (setup.has_halo) {
    params.halo = setup.halo.view();
  }
  params.stripe_tokens = setup.stripe_tokens;
  params.starts_context = setup.starts_context;
  params.k = k.data();
  params.max_k = max_k;
  params.scores = result.scores.data();
  params.ids = result.ids.data();
  Stream stream;
  const Status status = backend.search(params, stream);
  EXPECT_TRUE(status.ok()) << status;
  return result;
}

// Every candidate of every list, best first: a k that none exceeds.
SearchOutput full_ranking(Backend& reference, const SearchSetup& setup, int64_t& num_places) {
  num_places = 1;
  for (size_t row = 0; row < static_cast<size_t>(setup.num_rows); ++row) {
    num_places = std::max(num_places,
                          setup.spec.view == SearchView::kAnchor
                              ? setup.anchor_offsets[row + 1] - setup.anchor_offsets[row]
                              : setup.end[row] - setup.begin[row]);
  }
  const std::vector<int64_t> k(static_cast<size_t>(setup.num_rows), num_places);
  return search_with(reference, setup, k, num_places);
}

bool close(float actual, float expected, float slack) {
  return actual == expected || std::abs(actual - expected) <= slack;
}

// One list: the scores in order are the reference's, and each id has the score it is listed with.
void expect_list_matches(const float* scores,
                         const int64_t* ids,
                         int64_t k,
                         int64_t max_k,
                         const float* all_scores,
                         const int64_t* all_ids,
                         int64_t num_places,
                         float slack) {
  std::map<int64_t, float> score_of;
  for (int64_t i = 0; i < num_places && all_ids[i] >= 0; ++i) {
    score_of[all_ids[i]] = all_scores[i];
  }
  const int64_t kept = std::min(k, static_cast<int64_t>(score_of.size()));
  for (int64_t place = 0; place < max_k; ++place) {
    SCOPED_TRACE(::testing::Message() << "place " << place << " of " << kept);
    if (place >= kept) {
      ASSERT_EQ(ids[place], -1);
      ASSERT_EQ(scores[place], -kInfinity);
      continue;
    }
    if (slack == 0) {
      ASSERT_EQ(ids[place], all_ids[place]);
    }
    ASSERT_TRUE(close(scores[place], all_scores[place], slack))
        << scores[place] << " instead of " << all_scores[place];
    const auto found = score_of.find(ids[place]);
    ASSERT_NE(found, score_of.end()) << "id " << ids[place] << " twice, or no candidate";
    ASSERT_TRUE(close(scores[place], found->second, slack))
        << "id " << ids[place] << " has " << found->second << ", not " << scores[place];
    score_of.erase(found);
  }
}

class SearchConformance : public Conformance {
 protected:
  // relative: what scores may differ by, as a part of the largest of all lists; 0: not at all. (The
  // largest of one list may be small because its terms cancel, and the rounding does not.)
  void check(const SearchSetup& setup, float relative, int num_threads = 2) const {
    int64_t num_places = 0;
    const SearchOutput all = full_ranking(*reference(), setup, num_places);
    float largest = 0;
    for (const float score : all.scores) {
      largest = std::isfinite(score) ? std::max(largest, std::abs(score)) : largest;
    }
    const SearchOutput actual = search_with(*backend(num_threads), setup, setup.k, setup.max_k);
    for (int64_t list = 0; list < setup.num_rows * setup.num_lists(); ++list) {
      SCOPED_TRACE(::testing::Message()
                   << "list " << list << " of " << setup.num_lists() << " a row, reduce "
                   << static_cast<int>(setup.spec.head_reduce) << ", seed " << test_seed());
      expect_list_matches(actual.scores.data() + list * setup.max_k,
                          actual.ids.data() + list * setup.max_k,
                          setup.k[static_cast<size_t>(list / setup.num_lists())],
                          setup.max_k,
                          all.scores.data() + list * num_places,
                          all.ids.data() + list * num_places,
                          num_places,
                          relative * largest);
      if (::testing::Test::HasFatalFailure()) {
        return;
      }
    }
  }
};

struct Shape {
  int num_query_heads = 6;
  int num_kv_heads = 2;
  int dim = 64;
  int64_t num_entries = 0;
  int64_t num_rows = 1;
  DataType dtype = DataType::kBFloat16;
};

std::vector<float> whole_numbers(size_t count, Random& random) {
  std::vector<float> values(count);
  for (float& value : values) {
    value = static_cast<float>(random.between(-2, 2));
  }
  return values;
}

SearchSetup block_setup(const Shape& shape, const SearchSpec& spec, bool exact, Random& random) {
  const auto numbers = [&](int64_t count) {
    const auto size = static_cast<size_t>(count);
    return exact ? whole_numbers(size, random) : random.normals(size);
  };
  SearchSetup setup;
  setup.spec = spec;
  setup.num_query_heads = shape.num_query_heads;
  setup.num_rows = shape.num_rows;
  setup.query = numbers(shape.num_rows * shape.num_query_heads * shape.dim);
  std::vector<float> keys = numbers(shape.num_entries * shape.num_kv_heads * shape.dim);
  std::vector<float> maxima;
  if (spec.score == ScoreKind::kBound) {
    maxima = numbers(static_cast<int64_t>(keys.size()));
    for (size_t i = 0; i < keys.size(); ++i) {
      if (keys[i] > maxima[i]) {
        std::swap(keys[i], maxima[i]);
      }
    }
  }
  setup.view = PagedTensor(
      shape.dtype, shape.num_kv_heads, shape.dim, maxima.empty() ? 0 : shape.dim, keys, maxima);
  for (int64_t row = 0; row < shape.num_rows; ++row) {
    const int64_t end = random.chance(0.1) ? 0 : random.between(0, shape.num_entries);
    setup.end.push_back(row == 0 ? shape.num_entries : end);
    setup.begin.push_back(row == 0 ? 0 : random.between(0, end));
    setup.k.push_back(random.between(0, 20));
  }
  setup.k[0] = 20;
  setup.max_k = 20;
  return setup;
}

constexpr HeadReduce kReduces[] = {HeadReduce::kNone,
                                   HeadReduce::kGroupSum,
                                   HeadReduce::kGroupMean,
                                   HeadReduce::kGroupMax,
                                   HeadReduce::kAllSum,
                                   HeadReduce::kAllMean,
                                   HeadReduce::kAllMax};

TEST_P(SearchConformance, DotAndBoundUnderEveryReduction) {
  Random numbers = random(1);
  int round = 0;
  for (const ScoreKind score : {ScoreKind::kDot, ScoreKind::kBound}) {
    for (const QueryReduce query_reduce :
         {QueryReduce::kNone, QueryReduce::kGroupMean, QueryReduce::kAllMean}) {
      for (const HeadReduce head_reduce : kReduces) {
        SearchSpec spec;
        spec.score = score;
        spec.query_reduce = query_reduce;
        spec.head_reduce = head_reduce;
        Shape shape{.num_entries = 150, .num_rows = 7, .dtype = kDtypes[round++ % 3]};
        shape.num_query_heads = 8;  // means over 4 and 8 heads of whole numbers are exact
        check(block_setup(shape, spec, /*exact=*/true, numbers), 0);
        check(block_setup(shape, spec, /*exact=*/false, numbers), 1e-5F);
      }
    }
  }
}

TEST_P(SearchConformance, HeadSizesGroupsAndLengths) {
  Random numbers = random(2);
  for (const int dim : {8, 64, 80, 96, 128, 192, 256}) {
    for (const int64_t num_entries : {0, 1, 63, 64, 65, 300}) {
      for (const ScoreKind score : {ScoreKind::kDot, ScoreKind::kBound}) {
        SearchSpec spec;
        spec.score = score;
        const Shape shape{.num_query_heads = 5,
                          .num_kv_heads = 1,
                          .dim = dim,
                          .num_entries = num_entries,
                          .num_rows = 3,
                          .dtype = kDtypes[num_entries % 3]};
        check(block_setup(shape, spec, /*exact=*/true, numbers), 0);
      }
    }
  }
}

TEST_P(SearchConformance, ManyBlocksAreDealtToThreadsAndTiesKeepTheLowerId) {
  Random numbers = random(3);
  for (const int num_threads : {1, 2, 5}) {
    for (const HeadReduce head_reduce : {HeadReduce::kNone, HeadReduce::kAllSum}) {
      SearchSpec spec;
      spec.head_reduce = head_reduce;
      const Shape shape{.num_entries = 10000, .num_rows = 2};
      SearchSetup setup = block_setup(shape, spec, /*exact=*/true, numbers);
      setup.k = {300, 7};
      setup.max_k = 400;
      check(setup, 0, num_threads);
    }
  }
}

TEST_P(SearchConformance, MoreWantedThanThereAre) {
  Random numbers = random(4);
  const Shape shape{.num_entries = 30, .num_rows = 2};
  SearchSetup setup = block_setup(shape, SearchSpec{}, /*exact=*/true, numbers);
  setup.k = {1000, 0};
  setup.max_k = 1000;
  check(setup, 0);
}

TEST_P(SearchConformance, NanAndInfiniteScoresAreOrdered) {
  Random numbers = random(5);
  for (const ScoreKind score : {ScoreKind::kDot, ScoreKind::kBound}) {
    for (const HeadReduce head_reduce : kReduces) {
      SearchSpec spec;
      spec.score = score;
      spec.head_reduce = head_reduce;
      const Shape shape{.num_entries = 100, .num_rows = 2};
      SearchSetup setup = block_setup(shape, spec, /*exact=*/true, numbers);
      for (const int64_t entry : {0, 40, 41, 99}) {
        setup.view.set_key(entry, 1, 0, entry == 41 ? -kInfinity : kNan);
      }
      if (score == ScoreKind::kBound) {
        setup.view.set_value(50, 0, 5, kInfinity);
      } else {
        setup.view.set_key(50, 0, 5, kInfinity);
      }
      setup.k = {100, 100};
      setup.max_k = 100;
      check(setup, 0);
    }
  }
}

TEST_P(SearchConformance, Anchors) {
  Random numbers = random(6);
  for (const HeadReduce head_reduce : kReduces) {
    for (const int dim : {64, 72, 128}) {
      SearchSpec spec;
      spec.view = SearchView::kAnchor;
      spec.head_reduce = head_reduce;
      const Shape shape{.num_query_heads = 8,
                        .dim = dim,
                        .num_entries = 3000,
                        .num_rows = 5,
                        .dtype = kDtypes[dim % 3]};
      SearchSetup setup = block_setup(shape, spec, /*exact=*/true, numbers);
      setup.anchor_offsets = {0};
      for (int64_t row = 0; row < shape.num_rows; ++row) {
        for (int64_t token = row * 100; row != 3 && token < shape.num_entries;
             token += numbers.between(1, 4)) {
          setup.anchors.push_back(token);
        }
        setup.anchor_offsets.push_back(static_cast<int64_t>(setup.anchors.size()));
      }
      check(setup, 0);
    }
  }
}

// Windows of a shard with several stripes; what may not be read is poison.
SearchSetup importance_setup(
    int window, int stride, int block, int64_t stripe_tokens, bool starts_context, Random& random) {
  SearchSetup setup;
  setup.spec.normalise = Normalise::kSoftmax;
  setup.summary.kind = SummaryKind::kCompressed;
  setup.summary.window_tokens = window;
  setup.summary.stride_tokens = stride;
  setup.block_tokens = block;
  setup.num_query_heads = 6;
  setup.num_rows = 9;
  setup.stripe_tokens = stripe_tokens;
  setup.starts_context = starts_context;
  setup.scale = 0.125F;
  const int64_t num_tokens = 20 * 256;
  const int dim = 64;
  const int64_t num_windows = num_tokens / stride;
  setup.query = random.normals(static_cast<size_t>(setup.num_rows * setup.num_query_heads * dim));
  const auto size = [&](int64_t entries) { return static_cast<size_t>(entries * 2 * dim); };
  setup.view = PagedTensor(DataType::kBFloat16,
                           2,
                           dim,
                           dim,
                           random.normals(size(num_windows)),
                           random.normals(size(num_windows)));
  const int64_t before = window / stride - 1;
  if (stripe_tokens > 0 && before > 0) {
    setup.has_halo = true;
    const int64_t entries = before * (num_tokens / stripe_tokens);
    std::vector<float> keys = random.normals(size(entries));
    if (starts_context) {
      std::fill_n(keys.begin(), size(before), kNan);
    }
    setup.halo = PagedTensor(DataType::kBFloat16, 2, dim, 0, keys, {});
  }
  for (int64_t row = 0; row < setup.num_rows; ++row) {
    const int64_t visible_tokens = random.between(1, num_tokens);
    setup.end.push_back(visible_tokens / block);
    setup.begin.push_back(random.between(0, setup.end.back() / 2));
    // Windows at the end of a stripe reach beyond it, into tokens that other ranks hold.
    setup.visible.push_back(std::max<int64_t>(0, visible_tokens / stride - before));
    setup.k.push_back(random.between(1, 16));
    for (int head = 0; head < setup.num_query_heads; ++head) {
      setup.lse.push_back(random.normal() + 6.0F);
    }
  }
  setup.max_k = 16;
  return setup;
}

TEST_P(SearchConformance, ImportanceOfBlocksThatWindowsOverlap) {
  Random numbers = random(7);
  const int shapes[][3] = {
      {32, 16, 64}, {64, 64, 64}, {32, 16, 256}, {64, 16, 64}, {128, 16, 64}, {32, 32, 32}};
  for (const auto& [window, stride, block] : shapes) {
    for (const int64_t stripe_tokens : {0, 256, 1024}) {
      for (const bool starts_context : {true, false}) {
        SearchSetup setup =
            importance_setup(window, stride, block, stripe_tokens, starts_context, numbers);
        for (const HeadReduce head_reduce : kReduces) {
          setup.spec.head_reduce = head_reduce;
          setup.soft_cap = head_reduce == HeadReduce::kGroupSum ? 20.0F : 0.0F;
          check(setup, 1e-5F);
        }
      }
    }
  }
}

// One window a block and one head: the score is exp(logit - lse), bare.
TEST_P(SearchConformance, ExponentialsAreExactToTwoInTenMillion) {
  SearchSetup setup;
  setup.spec.normalise = Normalise::kSoftmax;
  setup.summary.kind = SummaryKind::kCompressed;
  setup.summary.window_tokens = 64;
  setup.summary.stride_tokens = 64;
  setup.block_tokens = 64;
  setup.num_query_heads = 1;
  setup.num_rows = 1;
  setup.lse = {0.0F};
  Random numbers = random(8);
  const int64_t count = 20000;
  std::vector<float> keys(static_cast<size_t>(count) * 8, 0.0F);
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    keys[i * 8] = std::min(0.0F, -90.0F + static_cast<float>(i) * 0.005F + numbers.normal(1e-3F));
  }
  setup.query = std::vector<float>(8, 1.0F);
  setup.view = PagedTensor(DataType::kFloat32, 1, 8, 0, keys, {});
  setup.begin = {0};
  setup.end = {count};
  setup.visible = {count};
  setup.k = {count};
  setup.max_k = count;
  const SearchOutput actual = search_with(*backend(2), setup, setup.k, setup.max_k);
  for (size_t place = 0; place < static_cast<size_t>(count); ++place) {
    ASSERT_GE(actual.ids[place], 0);
    const double x = keys[static_cast<size_t>(actual.ids[place]) * 8];
    const double expected = x < -87.33 ? 0.0 : std::exp(x);
    ASSERT_NEAR(actual.scores[place], expected, x < -87.3 ? 2e-38 : 2e-7 * expected) << "exp " << x;
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, SearchConformance, kAllTargets, target_name);

}  // namespace
}  // namespace longspan::testing
