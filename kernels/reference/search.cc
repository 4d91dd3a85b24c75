// Scoring in double precision. A score is rounded to fp32 before anything is compared, because the
// order of candidates, on one rank and across ranks, is that of their fp32 scores.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/reference/stages.h"

namespace longspan::reference {
namespace {

constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();

double nan_to_lowest(double score) { return std::isnan(score) ? kNegativeInfinity : score; }

// The search queries of one row after query_reduce, each with its KV head.
struct ScoreHead {
  std::vector<double> query;
  int kv_head = 0;
  int query_head = 0;  // without query_reduce
};

std::vector<double> mean_query(const SearchParams& params, int64_t row, int first, int count) {
  const int dim = params.view.key_dim;
  std::vector<double> mean(static_cast<size_t>(dim), 0.0);
  for (int head = first; head < first + count; ++head) {
    const float* query = params.query + (row * params.num_query_heads + head) * dim;
    for (int d = 0; d < dim; ++d) {
      mean[static_cast<size_t>(d)] += static_cast<double>(query[d]) / count;
    }
  }
  return mean;
}

std::vector<ScoreHead> score_heads(const SearchParams& params, int64_t row) {
  const int group = params.num_query_heads / params.view.num_kv_heads;
  std::vector<ScoreHead> heads;
  if (params.spec->query_reduce == QueryReduce::kNone) {
    for (int head = 0; head < params.num_query_heads; ++head) {
      heads.push_back({mean_query(params, row, head, 1), head / group, head});
    }
    return heads;
  }
  for (int kv_head = 0; kv_head < params.view.num_kv_heads; ++kv_head) {
    const bool all = params.spec->query_reduce == QueryReduce::kAllMean;
    heads.push_back({all ? mean_query(params, row, 0, params.num_query_heads)
                         : mean_query(params, row, kv_head * group, group),
                     kv_head,
                     0});
  }
  return heads;
}

double dot(const ScoreHead& head, const PagedView& view, int64_t entry) {
  const std::byte* key = view.key(entry, head.kv_head);
  double sum = 0.0;
  for (int d = 0; d < view.key_dim; ++d) {
    const auto channel = static_cast<size_t>(d);
    sum += head.query[channel] * load_element(view.dtype, key, channel);
  }
  return sum;
}

// Quest: no key between the minima and maxima of a block has a larger dot product.
double bound(const ScoreHead& head, const PagedView& view, int64_t entry) {
  const std::byte* minima = view.key(entry, head.kv_head);
  const std::byte* maxima = view.value(entry, head.kv_head);
  double sum = 0.0;
  for (int d = 0; d < view.key_dim; ++d) {
    const auto channel = static_cast<size_t>(d);
    const double low = head.query[channel] * load_element(view.dtype, minima, channel);
    const double high = head.query[channel] * load_element(view.dtype, maxima, channel);
    sum += std::isnan(low) || std::isnan(high) ? std::nan("") : std::max(low, high);
  }
  return sum;
}

// NSA's importance of a block for one query head: sum over the windows i that overlap the block of
// overlap / stride * exp(logit_i - lse). Windows of a stripe start in it; the ones that reach into
// it from before are in the halo.
class Importance {
 public:
  Importance(const SearchParams& params, int64_t row) : params_(params), row_(row) {}

  double operator()(const ScoreHead& head, int64_t block) const {
    const int64_t length = params_.summary->window_tokens;
    const int64_t stride = params_.summary->stride_tokens;
    const int64_t block_begin = block * params_.block_tokens;
    const int64_t stripe = params_.stripe_tokens > 0 ? block_begin / params_.stripe_tokens : 0;
    const int64_t stripe_begin = stripe * params_.stripe_tokens;
    double sum = 0.0;

    const int64_t num_before = length / stride - 1;
    const bool has_halo = params_.halo.pages != nullptr && !(params_.starts_context && stripe == 0);
    for (int64_t m = 0; has_halo && m < num_before; ++m) {
      const int64_t begin = stripe_begin - (num_before - m) * stride;
      const double weight = overlap(begin, block_begin);
      if (weight > 0.0) {
        sum += weight * probability(head, params_.halo, stripe * num_before + m);
      }
    }
    const int64_t first = std::max(stripe_begin / stride, (block_begin - length) / stride + 1);
    const int64_t end =
        std::min(params_.visible_entries[row_], (block_begin + params_.block_tokens) / stride);
    for (int64_t entry = std::max<int64_t>(0, first); entry < end; ++entry) {
      sum += overlap(entry * stride, block_begin) * probability(head, params_.view, entry);
    }
    return sum;
  }

 private:
  // In strides; 0 when they do not meet.
  double overlap(int64_t window_begin, int64_t block_begin) const {
    const int64_t begin = std::max(window_begin, block_begin);
    const int64_t end =
        std::min(window_begin + params_.summary->window_tokens, block_begin + params_.block_tokens);
    return std::max(0.0, static_cast<double>(end - begin) / params_.summary->stride_tokens);
  }
  double probability(const ScoreHead& head, const PagedView& windows, int64_t entry) const {
    const double scaled = params_.scale * dot(head, windows, entry);
    const double logit =
        params_.soft_cap > 0.0F ? params_.soft_cap * std::tanh(scaled / params_.soft_cap) : scaled;
    return std::exp(logit - params_.lse[row_ * params_.num_query_heads + head.query_head]);
  }

  const SearchParams& params_;
  int64_t row_;
};

// Scores of one candidate after head_reduce, one for each selection list.
std::vector<double> reduce_heads(HeadReduce reduce, int num_kv_heads, std::vector<double> scores) {
  if (reduce == HeadReduce::kNone) {
    return scores;
  }
  const bool all = reduce == HeadReduce::kAllSum || reduce == HeadReduce::kAllMean ||
                   reduce == HeadReduce::kAllMax;
  const bool maximum = reduce == HeadReduce::kAllMax || reduce == HeadReduce::kGroupMax;
  const bool mean = reduce == HeadReduce::kAllMean || reduce == HeadReduce::kGroupMean;
  const size_t num_lists = all ? 1 : static_cast<size_t>(num_kv_heads);
  const size_t per_list = scores.size() / num_lists;
  std::vector<double> reduced(num_lists, maximum ? kNegativeInfinity : 0.0);
  for (size_t i = 0; i < scores.size(); ++i) {
    double& result = reduced[i / per_list];
    result = maximum ? std::max(result, scores[i]) : result + scores[i];
  }
  for (double& result : reduced) {
    result = nan_to_lowest(mean ? result / static_cast<double>(per_list) : result);
  }
  return reduced;
}

std::vector<double> score(const SearchParams& params,
                          const std::vector<ScoreHead>& heads,
                          int64_t row,
                          int64_t candidate) {
  std::vector<double> scores;
  for (const ScoreHead& head : heads) {
    double value = 0.0;
    if (params.spec->normalise == Normalise::kSoftmax) {
      value = Importance(params, row)(head, candidate);
    } else if (params.spec->score == ScoreKind::kBound) {
      value = bound(head, params.view, candidate);
    } else {
      value = dot(head, params.view, candidate);
    }
    scores.push_back(nan_to_lowest(value));
  }
  return reduce_heads(params.spec->head_reduce, params.view.num_kv_heads, std::move(scores));
}

std::vector<int64_t> candidates_of(const SearchParams& params, int64_t row) {
  std::vector<int64_t> candidates;
  if (params.spec->view == SearchView::kAnchor) {
    candidates.assign(params.candidates + params.candidate_offsets[row],
                      params.candidates + params.candidate_offsets[row + 1]);
  } else {
    for (int64_t block = params.candidate_begin[row]; block < params.candidate_end[row]; ++block) {
      candidates.push_back(block);
    }
  }
  return candidates;
}

struct Scored {
  float score;
  int64_t id;
  bool operator<(const Scored& other) const {
    return score != other.score ? score > other.score : id < other.id;
  }
};

void search_row(const SearchParams& params, int64_t row) {
  const auto num_lists = static_cast<size_t>(
      num_selection_heads(*params.spec, params.num_query_heads, params.view.num_kv_heads));
  const std::vector<ScoreHead> heads = score_heads(params, row);
  std::vector<std::vector<Scored>> lists(num_lists);
  for (const int64_t candidate : candidates_of(params, row)) {
    const std::vector<double> scores = score(params, heads, row, candidate);
    for (size_t list = 0; list < num_lists; ++list) {
      lists[list].push_back({static_cast<float>(scores[list]), candidate});
    }
  }
  for (size_t list = 0; list < num_lists; ++list) {
    std::sort(lists[list].begin(), lists[list].end());
    const auto kept = std::min<size_t>(lists[list].size(), static_cast<size_t>(params.k[row]));
    const size_t first =
        (static_cast<size_t>(row) * num_lists + list) * static_cast<size_t>(params.max_k);
    for (size_t place = 0; place < static_cast<size_t>(params.max_k); ++place) {
      const bool used = place < kept;
      params.scores[first + place] =
          used ? lists[list][place].score : -std::numeric_limits<float>::infinity();
      params.ids[first + place] = used ? lists[list][place].id : -1;
    }
  }
}

}  // namespace

void search(const SearchParams& params) {
  for (int64_t row = 0; row < params.num_rows; ++row) {
    search_row(params, row);
  }
}

}  // namespace longspan::reference
