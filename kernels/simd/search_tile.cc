#include "kernels/simd/search_tile.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <new>

namespace longspan::simd {
namespace {

HeadJoin join_of(HeadReduce reduce) {
  switch (reduce) {
    case HeadReduce::kNone:
      return HeadJoin::kNone;
    case HeadReduce::kGroupMax:
    case HeadReduce::kAllMax:
      return HeadJoin::kMax;
    case HeadReduce::kGroupSum:
    case HeadReduce::kGroupMean:
    case HeadReduce::kAllSum:
    case HeadReduce::kAllMean:
      break;
  }
  return HeadJoin::kSum;
}

}  // namespace

SearchShape::SearchShape(const SearchParams& params) {
  const SearchSpec& spec = *params.spec;
  const int64_t num_kv_heads = params.view.num_kv_heads;
  const bool all = spec.head_reduce == HeadReduce::kAllSum ||
                   spec.head_reduce == HeadReduce::kAllMean ||
                   spec.head_reduce == HeadReduce::kAllMax;
  const bool mean =
      spec.head_reduce == HeadReduce::kGroupMean || spec.head_reduce == HeadReduce::kAllMean;
  group = params.num_query_heads / num_kv_heads;
  num_heads = spec.query_reduce == QueryReduce::kNone ? group : 1;
  query_dim = params.view.key_dim * (spec.score == ScoreKind::kBound ? 2 : 1);
  join = join_of(spec.head_reduce);
  kv_heads_per_set = all ? num_kv_heads : 1;
  num_sets = all ? 1 : num_kv_heads;
  lists_per_set = join == HeadJoin::kNone ? num_heads : 1;
  mean_divisor = mean ? static_cast<float>(num_heads * kv_heads_per_set) : 1.0F;
}

SearchTile::SearchTile(const SearchParams& params,
                       const SearchShape& shape,
                       const SearchTask& task,
                       const Target& target,
                       Arena& arena)
    : params_(params), shape_(shape), task_(task), target_(target), arena_(arena) {
  const int64_t num_lists = task.num_rows * shape.lists_per_set;
  best_ = arena.take<TopK>(static_cast<size_t>(num_lists));
  auto* places =
      arena.take<uint64_t>(static_cast<size_t>(num_lists * TopK::capacity(params.max_k)));
  for (int64_t list = 0; list < num_lists; ++list) {
    new (best_ + list) TopK();
    best_[list].start(params.k[task.first_row + list / shape.lists_per_set],
                      places + list * TopK::capacity(params.max_k));
  }
  prepare_queries();
}

size_t SearchTile::arena_bytes(const SearchParams& params,
                               const SearchShape& shape,
                               int64_t num_rows) {
  const int64_t num_lists = num_rows * shape.lists_per_set;
  const int64_t num_queries = num_rows * shape.kv_heads_per_set * shape.num_heads;
  return static_cast<size_t>(num_lists) *
             (sizeof(TopK) + static_cast<size_t>(TopK::capacity(params.max_k)) * sizeof(uint64_t)) +
         static_cast<size_t>(num_queries) *
             (sizeof(const float*) + static_cast<size_t>(shape.query_dim) * sizeof(float));
}

void SearchTile::prepare_queries() {
  const int64_t per_row = shape_.kv_heads_per_set * shape_.num_heads;
  const int64_t num_queries = task_.num_rows * per_row;
  queries_ = arena_.take<const float*>(static_cast<size_t>(num_queries));
  auto* prepared = arena_.take<float>(static_cast<size_t>(num_queries * shape_.query_dim));
  for (int64_t i = 0; i < num_queries; ++i) {
    float* query = prepared + i * shape_.query_dim;
    const int64_t in_row = i % per_row;
    reduce_query(task_.first_row + i / per_row,
                 first_kv_head() + in_row / shape_.num_heads,
                 in_row % shape_.num_heads,
                 query);
    if (params_.spec->score == ScoreKind::kBound) {
      for (int channel = 0; channel < params_.view.key_dim; ++channel) {
        const float value = query[channel];
        query[channel] = value < 0.0F ? value : 0.0F;
        query[params_.view.key_dim + channel] = value < 0.0F ? 0.0F : value;  // NaN stays here
      }
    }
    queries_[i] = query;
  }
}

// The query of a scored head: the head's own, or the mean over its group or over all heads.
void SearchTile::reduce_query(int64_t row, int64_t kv_head, int64_t head, float* out) const {
  const QueryReduce reduce = params_.spec->query_reduce;
  const int64_t dim = params_.view.key_dim;
  const bool all = reduce == QueryReduce::kAllMean;
  const int64_t first = all ? 0 : kv_head * shape_.group + head;
  const int64_t count = reduce == QueryReduce::kNone ? 1
                        : all                        ? params_.num_query_heads
                                                     : shape_.group;
  const float* queries = params_.query + (row * params_.num_query_heads + first) * dim;
  for (int64_t channel = 0; channel < dim; ++channel) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      sum += queries[i * dim + channel];
    }
    out[channel] = static_cast<float>(sum / static_cast<double>(count));
  }
}

void SearchTile::offer_page(
    int64_t row, int64_t list, const float* scores, uint64_t mask, int64_t first_candidate) {
  TopK& best_of_list = best(row, list);
  const float divisor = shape_.mean_divisor;
  if (best_of_list.full()) {
    // A little below what the division asks for: rounding must not lose a candidate here.
    float limit = best_of_list.threshold() * divisor;
    limit = divisor == 1.0F ? limit : limit - std::abs(limit) * 1e-6F;
    mask &= target_.above(scores, limit);
  }
  for (; mask != 0; mask &= mask - 1) {
    const int64_t i = std::countr_zero(mask);
    const float score = scores[i] / divisor;
    if (!best_of_list.full() || score > best_of_list.threshold()) {
      best_of_list.offer(score, first_candidate + i);
    }
  }
}

void SearchTile::finish() {
  const int64_t num_lists = shape_.num_sets * shape_.lists_per_set;
  for (int64_t row = 0; row < task_.num_rows; ++row) {
    for (int64_t list = 0; list < shape_.lists_per_set; ++list) {
      TopK& found = best(row, list);
      found.finish();
      if (task_.num_parts == 1) {
        store_candidates(params_,
                         num_lists,
                         task_.first_row + row,
                         task_.set * shape_.lists_per_set + list,
                         found.candidates(),
                         found.count());
        continue;
      }
      const int64_t place = row * shape_.lists_per_set + list;
      std::copy_n(found.candidates(), found.count(), task_.part_candidates + place * params_.max_k);
      task_.part_counts[place] = found.count();
    }
  }
}

void store_candidates(const SearchParams& params,
                      int64_t num_lists,
                      int64_t row,
                      int64_t list,
                      const uint64_t* candidates,
                      int64_t count) {
  const int64_t first = (row * num_lists + list) * params.max_k;
  for (int64_t place = 0; place < params.max_k; ++place) {
    const bool used = place < count;
    params.scores[first + place] =
        used ? Candidate::score(candidates[place]) : -std::numeric_limits<float>::infinity();
    params.ids[first + place] = used ? Candidate::id(candidates[place]) : -1;
  }
}

size_t ScoreScratch::arena_bytes(const SearchShape& shape, int64_t key_dim, int64_t num_rows) {
  const int64_t lanes = num_rows * shape.num_heads;
  const int64_t floats = (shape.query_dim + key_dim + lanes) * kPageTokens;
  return static_cast<size_t>(floats) * sizeof(float) +
         static_cast<size_t>(lanes + 2 * num_rows) * sizeof(const float*);
}

ScoreScratch::ScoreScratch(SearchTile& tile, DataType dtype) {
  const SearchParams& params = tile.params();
  const SearchShape& shape = tile.shape();
  const auto lanes = static_cast<size_t>(tile.task().num_rows * shape.num_heads);
  const auto rows = static_cast<size_t>(tile.task().num_rows);
  score.num_heads = static_cast<size_t>(shape.num_heads);
  score.key_dim = static_cast<size_t>(params.view.key_dim);
  score.dtype = dtype;
  score.bound = params.spec->score == ScoreKind::kBound;
  score.join = shape.join;
  score.softmax = params.spec->normalise == Normalise::kSoftmax;
  score.scale = params.scale;
  score.soft_cap = params.soft_cap;
  score.packed = tile.arena().take<float>(static_cast<size_t>(shape.query_dim) * kPageTokens);
  score.widened = tile.arena().take<float>(score.key_dim * kPageTokens);
  score.products = tile.arena().take<float>(lanes * kPageTokens);
  queries = tile.arena().take<const float*>(lanes);
  lse = tile.arena().take<const float*>(rows);
  scores = tile.arena().take<float*>(rows);
}

}  // namespace longspan::simd
