#include "kernels/reference/selection.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/anchors.h"

namespace longspan::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// --- Summaries: single precision, token order, then rounded to the cache's type. ---

float rounded(DataType type, float value) {
  float storage = 0.0F;
  store_element(type, &storage, 0, value);
  return load_element(type, &storage, 0);
}

// One channel of tokens [begin, begin + length), `step` elements apart.
struct Column {
  const float* first;
  int64_t length;
  int64_t step;

  float operator[](int64_t i) const { return first[i * step]; }
  float mean() const {
    float sum = 0.0F;
    for (int64_t i = 0; i < length; ++i) {
      sum += (*this)[i];
    }
    return sum / static_cast<float>(length);
  }
  float weighted(const std::vector<float>& weights) const {
    float sum = 0.0F;
    for (int64_t i = 0; i < length; ++i) {
      sum = std::fma(weights[static_cast<size_t>(i)], (*this)[i], sum);
    }
    return sum;
  }
  // A later element replaces an earlier one only when strictly lower (higher).
  float minimum() const {
    float best = (*this)[0];
    for (int64_t i = 1; i < length; ++i) {
      best = (*this)[i] < best ? (*this)[i] : best;
    }
    return best;
  }
  float maximum() const {
    float best = (*this)[0];
    for (int64_t i = 1; i < length; ++i) {
      best = (*this)[i] > best ? (*this)[i] : best;
    }
    return best;
  }
};

float summarize_keys(const SummarySpec& spec, const Column& keys) {
  switch (spec.kind) {
    case SummaryKind::kMean:
      return spec.scale_by_sqrt_length
                 ? keys.mean() * static_cast<float>(std::sqrt(static_cast<double>(keys.length)))
                 : keys.mean();
    case SummaryKind::kMinMax:
      return keys.minimum();
    case SummaryKind::kCompressed:
      return spec.key_weights.empty() ? keys.mean() : keys.weighted(spec.key_weights);
    case SummaryKind::kNone:
      break;
  }
  return 0.0F;
}

float summarize_values(const SummarySpec& spec, const Column& column) {
  if (spec.kind == SummaryKind::kMinMax) {
    return column.maximum();
  }
  const std::vector<float>& weights =
      spec.value_weights.empty() ? spec.key_weights : spec.value_weights;
  return weights.empty() ? column.mean() : column.weighted(weights);
}

// --- Scores ---

std::vector<double> widened(const float* vector, int dim) { return {vector, vector + dim}; }

double dot(const std::vector<double>& query, const float* key) {
  double sum = 0.0;
  for (size_t d = 0; d < query.size(); ++d) {
    sum += query[d] * key[d];
  }
  return sum;
}

// A NaN is the lowest score, and scores are compared in single precision.
double comparable(double score) {
  return std::isnan(score) ? -kInfinity : static_cast<double>(static_cast<float>(score));
}

bool before(const ReferenceSelected& a, const ReferenceSelected& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

// Scores of candidates by search head, [heads][candidates].
using Scores = std::vector<std::vector<double>>;

class Scorer {
 public:
  Scorer(const ReferenceProblem& problem, const Branch& branch, int64_t row)
      : problem_(problem),
        branch_(branch),
        row_(row),
        position_(problem.positions[row]),
        group_(problem.num_query_heads / problem.num_kv_heads) {}

  // Raw scores of `candidates`, entries of `view`.
  Scores raw(const Entries& view, const std::vector<int64_t>& candidates) const {
    Scores scores;
    for (const auto& [query, kv_head] : search_queries()) {
      std::vector<double>& list = scores.emplace_back();
      for (const int64_t candidate : candidates) {
        list.push_back(
            branch_.search.score == ScoreKind::kBound
                ? bound(query, view.key(candidate, kv_head), view.value(candidate, kv_head))
                : dot(query, view.key(candidate, kv_head)));
      }
    }
    return reduce(std::move(scores));
  }

  // NSA, equations 8 and 9: p_i = softmax over the visible windows of scale q . K~_i, per query
  // head; the importance of block j is the sum over i of |window i meets block j| / stride * p_i.
  // (Equation 9 read with indices from 1; docs/methods.md shows why.)
  Scores importance(const Entries& windows, const std::vector<int64_t>& candidates) const {
    const SummarySpec& spec = branch_.summary;
    const int64_t visible = spec.num_entries(position_ + 1);
    Scores scores;
    for (int head = 0; head < problem_.num_query_heads; ++head) {
      const std::vector<double> p = probabilities(windows, head, visible);
      std::vector<double>& list = scores.emplace_back();
      for (const int64_t block : candidates) {
        const int64_t begin = block * branch_.selection.block_tokens;
        const int64_t end = begin + branch_.selection.block_tokens;
        double sum = 0.0;
        for (int64_t i = 0; i < visible; ++i) {
          const int64_t window = i * spec.stride_tokens;
          const int64_t overlap =
              std::min(end, window + spec.window_tokens) - std::max(begin, window);
          if (overlap > 0) {
            sum += static_cast<double>(overlap) / spec.stride_tokens * p[static_cast<size_t>(i)];
          }
        }
        list.push_back(sum);
      }
    }
    return reduce(std::move(scores));
  }

 private:
  struct SearchQuery {
    std::vector<double> query;
    int kv_head;
  };

  std::vector<double> query_of(int head) const {
    const float* queries =
        branch_.search.query == QuerySource::kSupplied ? problem_.search_query : problem_.query;
    return widened(queries + (row_ * problem_.num_query_heads + head) * problem_.key_dim,
                   problem_.key_dim);
  }

  std::vector<double> mean_of(int first_head, int count) const {
    std::vector<double> mean(static_cast<size_t>(problem_.key_dim), 0.0);
    for (int head = first_head; head < first_head + count; ++head) {
      const std::vector<double> query = query_of(head);
      for (size_t d = 0; d < mean.size(); ++d) {
        mean[d] += query[d] / count;
      }
    }
    return mean;
  }

  std::vector<SearchQuery> search_queries() const {
    std::vector<SearchQuery> queries;
    switch (branch_.search.query_reduce) {
      case QueryReduce::kNone:
        for (int head = 0; head < problem_.num_query_heads; ++head) {
          queries.push_back({query_of(head), head / group_});
        }
        break;
      case QueryReduce::kGroupMean:
        for (int kv_head = 0; kv_head < problem_.num_kv_heads; ++kv_head) {
          queries.push_back({mean_of(kv_head * group_, group_), kv_head});
        }
        break;
      case QueryReduce::kAllMean:
        for (int kv_head = 0; kv_head < problem_.num_kv_heads; ++kv_head) {
          queries.push_back({mean_of(0, problem_.num_query_heads), kv_head});
        }
        break;
    }
    return queries;
  }

  // Quest: the sum over channels of max(q m, q M) bounds every dot product of the block.
  static double bound(const std::vector<double>& query, const float* minima, const float* maxima) {
    double sum = 0.0;
    for (size_t d = 0; d < query.size(); ++d) {
      const double low = query[d] * minima[d];
      const double high = query[d] * maxima[d];
      const bool has_nan = std::isnan(low) || std::isnan(high);
      sum += has_nan ? low + high : std::max(low, high);
    }
    return sum;
  }

  std::vector<double> probabilities(const Entries& windows, int head, int64_t visible) const {
    const float* query =
        problem_.query + (row_ * problem_.num_query_heads + head) * problem_.key_dim;
    std::vector<double> p;
    double maximum = -kInfinity;
    for (int64_t i = 0; i < visible; ++i) {
      p.push_back(logit(problem_, query, windows.key(i, head / group_)));
      maximum = std::fmax(maximum, p.back());
    }
    double total = 0.0;
    for (double& value : p) {
      value = std::exp(value - maximum);
      total += value;
    }
    for (double& value : p) {
      value /= total;
    }
    return p;
  }

  Scores reduce(Scores scores) const {
    for (std::vector<double>& list : scores) {
      for (double& score : list) {
        score = std::isnan(score) ? -kInfinity : score;
      }
    }
    switch (branch_.search.head_reduce) {
      case HeadReduce::kNone:
        return scores;
      case HeadReduce::kGroupSum:
      case HeadReduce::kGroupMean:
      case HeadReduce::kGroupMax:
        return reduced(scores, static_cast<size_t>(group_));
      case HeadReduce::kAllSum:
      case HeadReduce::kAllMean:
      case HeadReduce::kAllMax:
        return reduced(scores, scores.size());
    }
    return scores;
  }

  // Every `count` lists become one.
  Scores reduced(const Scores& scores, size_t count) const {
    const HeadReduce kind = branch_.search.head_reduce;
    const bool maximum = kind == HeadReduce::kGroupMax || kind == HeadReduce::kAllMax;
    const bool mean = kind == HeadReduce::kGroupMean || kind == HeadReduce::kAllMean;
    Scores result;
    for (size_t first = 0; first < scores.size(); first += count) {
      std::vector<double> list = scores[first];
      for (size_t head = first + 1; head < first + count; ++head) {
        for (size_t i = 0; i < list.size(); ++i) {
          list[i] = maximum ? std::max(list[i], scores[head][i]) : list[i] + scores[head][i];
        }
      }
      for (double& score : list) {
        score /= mean ? static_cast<double>(count) : 1.0;
      }
      result.push_back(std::move(list));
    }
    return result;
  }

  const ReferenceProblem& problem_;
  const Branch& branch_;
  int64_t row_;
  int64_t position_;
  int group_;
};

// --- Selection ---

// Keeps the best `k` of scored candidates, in order; sets the margin.
void keep_best(std::vector<ReferenceSelected>& candidates, int64_t k, double& margin) {
  std::sort(candidates.begin(), candidates.end(), before);
  const auto kept = static_cast<size_t>(k);
  margin = kInfinity;
  if (kept < candidates.size()) {
    if (kept > 0) {
      const double last = candidates[kept - 1].score;
      const double refused = candidates[kept].score;
      margin = last == refused ? 0.0 : last - refused;
    }
    candidates.resize(kept);
  }
}

// Blocks: those before the query's own that are not forced are candidates. With B tokens a block
// and the query at t in block c = t / B, forced are the first ones and c, c - 1, ...
std::vector<ReferenceSelection> select_blocks(const ReferenceProblem& problem,
                                              const Branch& branch,
                                              const Entries& summaries,
                                              int64_t row) {
  const SelectionSpec& selection = branch.selection;
  const int64_t position = problem.positions[row];
  const int64_t own = position / selection.block_tokens;
  std::vector<int64_t> forced;
  std::vector<int64_t> candidates;
  for (int64_t block = 0; block <= own; ++block) {
    const bool is_forced =
        block < selection.forced_first_blocks || block > own - selection.forced_last_blocks;
    (is_forced ? forced : candidates).push_back(block);
  }
  int64_t budget = branch.budget.amount(problem.phase).blocks(own + 1, selection.block_tokens);
  if (selection.forced_within_budget) {
    budget = std::max<int64_t>(0, budget - static_cast<int64_t>(forced.size()));
  }
  const auto block = [&](int64_t id, bool is_forced, double score) {
    const int64_t begin = id * selection.block_tokens;
    return ReferenceSelected{
        id, {begin, std::min(begin + selection.block_tokens, position + 1)}, is_forced, score};
  };

  const Scorer scorer(problem, branch, row);
  const Scores scores = branch.search.normalise == Normalise::kSoftmax
                            ? scorer.importance(summaries, candidates)
                            : scorer.raw(summaries, candidates);
  std::vector<ReferenceSelection> lists;
  for (const std::vector<double>& of_head : scores) {
    ReferenceSelection& list = lists.emplace_back();
    for (size_t i = 0; i < candidates.size(); ++i) {
      list.selected.push_back(block(candidates[i], /*is_forced=*/false, comparable(of_head[i])));
    }
    keep_best(list.selected, budget, list.margin);
    for (const int64_t id : forced) {
      list.selected.push_back(block(id, /*is_forced=*/true, -kInfinity));
    }
    std::sort(list.selected.begin(), list.selected.end(), [](const auto& a, const auto& b) {
      return a.id < b.id;
    });
  }
  return lists;
}

// Superlinear: stripe i > first_stripe has its anchor at t + 1 - floor(i^(1/p)).
std::vector<ReferenceSelection> select_spans(const ReferenceProblem& problem,
                                             const Branch& branch,
                                             int64_t row) {
  const SearchSpec& search = branch.search;
  const SelectionSpec& selection = branch.selection;
  const int64_t position = problem.positions[row];
  const int64_t num_tokens = position + 1;
  const int64_t window_begin = std::max<int64_t>(0, num_tokens - static_window(branch));
  std::vector<int64_t> anchors;
  for (int64_t stripe = search.anchor_first_stripe + 1;; ++stripe) {
    const int64_t anchor = num_tokens - floor_root(stripe, search.anchor_power);
    if (anchor < 0) {
      break;
    }
    anchors.push_back(anchor);
  }
  const int64_t budget =
      branch.budget.amount(problem.phase).blocks(static_cast<int64_t>(anchors.size()), 1);
  const int64_t backward =
      ceil_scaled_power(selection.span_backward, num_tokens, selection.span_power);
  const int64_t forward =
      ceil_scaled_power(selection.span_forward, num_tokens, selection.span_power);

  const Scores scores = Scorer(problem, branch, row).raw(tokens_of(problem), anchors);
  std::vector<ReferenceSelection> lists;
  for (const std::vector<double>& of_head : scores) {
    ReferenceSelection& list = lists.emplace_back();
    for (size_t i = 0; i < anchors.size(); ++i) {
      const int64_t anchor = anchors[i];
      const int64_t last = std::min({anchor + forward, position, window_begin - 1});
      list.selected.push_back({anchor,
                               {std::max<int64_t>(0, anchor - backward), last + 1},
                               /*forced=*/false,
                               comparable(of_head[i])});
    }
    keep_best(list.selected, budget, list.margin);
  }
  return lists;
}

std::vector<Span> runs_of(const std::vector<bool>& members) {
  std::vector<Span> runs;
  for (size_t i = 0; i < members.size(); ++i) {
    if (!members[i]) {
      continue;
    }
    const auto token = static_cast<int64_t>(i);
    if (runs.empty() || runs.back().end != token) {
      runs.push_back({token, token});
    }
    ++runs.back().end;
  }
  return runs;
}

// The union of selection, window and sinks among the tokens that the row sees.
std::vector<Span> attended_tokens(const Branch& branch,
                                  int64_t position,
                                  const std::vector<ReferenceSelected>& selected) {
  const int64_t num_tokens = position + 1;
  std::vector<bool> members(static_cast<size_t>(num_tokens),
                            branch.selection.kind == SelectionKind::kAll);
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t token = std::max<int64_t>(0, begin); token < std::min(end, num_tokens); ++token) {
      members[static_cast<size_t>(token)] = true;
    }
  };
  for (const ReferenceSelected& block : selected) {
    add(block.tokens.begin, block.tokens.end);
  }
  add(num_tokens - static_window(branch), num_tokens);
  add(0, branch.mask.sink_tokens);
  return runs_of(members);
}

}  // namespace

Entries tokens_of(const ReferenceProblem& problem) {
  return {problem.keys, problem.values, problem.num_kv_heads, problem.key_dim, problem.value_dim};
}

Summaries summarize_tokens(const ReferenceProblem& problem, const SummarySpec& spec) {
  Summaries result;
  if (spec.kind == SummaryKind::kNone) {
    return result;
  }
  const int heads = problem.num_kv_heads;
  const int key_dim = problem.key_dim;
  const bool of_keys = spec.kind == SummaryKind::kMinMax;  // what the summary's values are taken of
  int value_dim = of_keys ? key_dim : problem.value_dim;
  value_dim = spec.kind == SummaryKind::kMean ? 0 : value_dim;
  const float* value_source = of_keys ? problem.keys : problem.values;
  for (int64_t entry = 0; entry < spec.num_entries(problem.num_tokens); ++entry) {
    const int64_t begin = entry * spec.stride();
    for (int i = 0; i < heads * key_dim; ++i) {
      const Column column{problem.keys + begin * heads * key_dim + i, spec.span(), heads * key_dim};
      result.keys.push_back(rounded(problem.kv_dtype, summarize_keys(spec, column)));
    }
    for (int i = 0; i < heads * value_dim; ++i) {
      const Column column{
          value_source + begin * heads * value_dim + i, spec.span(), heads * value_dim};
      result.values.push_back(rounded(problem.kv_dtype, summarize_values(spec, column)));
    }
  }
  result.entries = {result.keys.data(), result.values.data(), heads, key_dim, value_dim};
  return result;
}

double logit(const ReferenceProblem& problem, const float* query, const float* key) {
  const double scaled = problem.scale * dot(widened(query, problem.key_dim), key);
  return problem.soft_cap > 0.0 ? problem.soft_cap * std::tanh(scaled / problem.soft_cap) : scaled;
}

std::vector<ReferenceSelection> select(const ReferenceProblem& problem,
                                       const Branch& branch,
                                       const Summaries& summaries,
                                       int64_t row) {
  std::vector<ReferenceSelection> lists(1);
  lists[0].margin = kInfinity;
  if (branch.needs_search()) {
    lists = branch.selection.spans ? select_spans(problem, branch, row)
                                   : select_blocks(problem, branch, summaries.entries, row);
  }
  std::vector<ReferenceSelection> by_head;
  for (int head = 0; head < problem.num_query_heads; ++head) {
    ReferenceSelection selection = lists[static_cast<size_t>(head) * lists.size() /
                                         static_cast<size_t>(problem.num_query_heads)];
    if (branch.source == BranchSource::kTokens) {
      selection.tokens = attended_tokens(branch, problem.positions[row], selection.selected);
    }
    by_head.push_back(std::move(selection));
  }
  return by_head;
}

}  // namespace longspan::reference
