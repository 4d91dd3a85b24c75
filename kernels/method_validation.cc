// What makes a method well-formed. Every rule that fails is reported, so that a user mends a
// configuration in one go.
#include <algorithm>
#include <bit>
#include <cmath>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

#include "kernels/anchors.h"
#include "kernels/method.h"

namespace longspan {
namespace {

constexpr int64_t kMaxBlockTokens = 1 << 16;
constexpr int64_t kMaxStaticTokens = int64_t{1} << 40;
constexpr int64_t kMaxFirstStripe = 1 << 20;
constexpr int64_t kMaxSpanFactor = 1000;
constexpr int64_t kMaxBudgetBlocks = 1 << 24;
constexpr size_t kMaxBranches = 16;

bool is_block_size(int64_t tokens) {
  return tokens > 0 && tokens <= kMaxBlockTokens &&
         std::has_single_bit(static_cast<uint64_t>(tokens));
}

// Collects violations under a field path.
class Violations {
 public:
  void add(absl::string_view field, absl::string_view description) {
    list_.push_back({path_.empty() ? std::string(field) : absl::StrCat(path_, ".", field),
                     std::string(description)});
  }
  void require(bool holds, absl::string_view field, absl::string_view description) {
    if (!holds) {
      add(field, description);
    }
  }
  void set_path(std::string path) { path_ = std::move(path); }
  std::vector<FieldViolation> take() { return std::move(list_); }

 private:
  std::string path_;
  std::vector<FieldViolation> list_;
};

constexpr absl::string_view kBlockRule = "must be a power of two from 1 to 65536";

void check_weights(const std::vector<float>& weights,
                   const SummarySpec& summary,
                   absl::string_view field,
                   Violations& violations) {
  if (weights.empty()) {
    return;
  }
  if (summary.kind != SummaryKind::kCompressed) {
    violations.add(field, "only a COMPRESSED summary has weights");
    return;
  }
  violations.require(
      static_cast<int64_t>(weights.size()) == summary.window_tokens,
      field,
      absl::StrCat(
          "needs window_tokens = ", summary.window_tokens, " weights, has ", weights.size()));
  violations.require(
      std::all_of(
          weights.begin(), weights.end(), [](float weight) { return std::isfinite(weight); }),
      field,
      "must be finite");
}

void check_summary(const SummarySpec& summary, Violations& violations) {
  const bool blocks = summary.kind == SummaryKind::kMean || summary.kind == SummaryKind::kMinMax;
  const bool windows = summary.kind == SummaryKind::kCompressed;
  if (blocks) {
    violations.require(is_block_size(summary.block_tokens), "summary.block_tokens", kBlockRule);
  } else {
    violations.require(summary.block_tokens == 0,
                       "summary.block_tokens",
                       "only MEAN and MIN_MAX summaries have a block");
  }
  if (windows) {
    violations.require(is_block_size(summary.window_tokens), "summary.window_tokens", kBlockRule);
    violations.require(is_block_size(summary.stride_tokens) && summary.stride_tokens <= kPageTokens,
                       "summary.stride_tokens",
                       "must be a power of two from 1 to 64");
    violations.require(summary.stride_tokens <= summary.window_tokens,
                       "summary.stride_tokens",
                       "must divide window_tokens");
  } else {
    violations.require(summary.window_tokens == 0,
                       "summary.window_tokens",
                       "only a COMPRESSED summary has windows");
    violations.require(summary.stride_tokens == 0,
                       "summary.stride_tokens",
                       "only a COMPRESSED summary has windows");
  }
  check_weights(summary.key_weights, summary, "summary.key_weights", violations);
  check_weights(summary.value_weights, summary, "summary.value_weights", violations);
  violations.require(!summary.scale_by_sqrt_length || summary.kind == SummaryKind::kMean,
                     "summary.scale_by_sqrt_length",
                     "only a MEAN summary can be scaled");
}

void check_rational(Rational value,
                    int64_t max_value,
                    absl::string_view field,
                    Violations& violations) {
  violations.require(value.denominator >= 1 && value.denominator <= kMaxDenominator &&
                         value.numerator >= 0 && value.numerator <= max_value * value.denominator,
                     field,
                     absl::StrCat("must be a fraction between 0 and ",
                                  max_value,
                                  " with a denominator up to ",
                                  kMaxDenominator));
}

void check_power(Rational power, absl::string_view field, Violations& violations) {
  check_rational(power, 1, field, violations);
  // An eighth bounds the tables' growth; no published method is below a half.
  violations.require(power.numerator * 8 >= power.denominator, field, "must be at least 1/8");
}

void check_span_selection(const Branch& branch, Violations& violations) {
  const SelectionSpec& selection = branch.selection;
  const SearchSpec& search = branch.search;
  violations.require(selection.spans, "selection.spans", "an ANCHOR search selects spans");
  violations.require(search.view == SearchView::kAnchor, "search.view", "spans need view ANCHOR");
  check_power(search.anchor_power, "search.anchors.power", violations);
  violations.require(
      search.anchor_first_stripe >= 0 && search.anchor_first_stripe <= kMaxFirstStripe,
      "search.anchors.first_stripe",
      absl::StrCat("must be from 0 to ", kMaxFirstStripe));
  check_power(selection.span_power, "selection.spans.power", violations);
  check_rational(selection.span_backward, kMaxSpanFactor, "selection.spans.backward", violations);
  check_rational(selection.span_forward, kMaxSpanFactor, "selection.spans.forward", violations);
  violations.require(branch.summary.kind == SummaryKind::kNone,
                     "summary.kind",
                     "an ANCHOR search reads the keys themselves and takes no summary");
  violations.require(
      search.score == ScoreKind::kDot, "search.score", "an ANCHOR search scores by DOT");
  violations.require(
      search.normalise == Normalise::kRaw, "search.normalise", "an ANCHOR search takes RAW scores");
  violations.require(selection.block_tokens == 0, "selection.block_tokens", "spans have no block");
  violations.require(selection.forced_first_blocks == 0,
                     "selection.forced_first_blocks",
                     "spans have no forced blocks");
  violations.require(selection.forced_last_blocks <= 1,
                     "selection.forced_last_blocks",
                     "spans have no forced blocks");
  violations.require(!selection.forced_within_budget,
                     "selection.forced_within_budget",
                     "spans have no forced blocks");
  violations.require(branch.mask.window_tokens == 0,
                     "mask.window_tokens",
                     "must be 0: the window follows from search.anchors.first_stripe");
  violations.require(branch.mask.sink_tokens == 0,
                     "mask.sink_tokens",
                     "must be 0: a sink could lie in a span twice");
}

void check_score(const Branch& branch, Violations& violations) {
  const SearchSpec& search = branch.search;
  const SummaryKind kind = branch.summary.kind;
  if (search.score == ScoreKind::kBound) {
    violations.require(
        kind == SummaryKind::kMinMax, "search.score", "BOUND needs a MIN_MAX summary");
  } else {
    violations.require(
        kind != SummaryKind::kMinMax, "search.score", "a MIN_MAX summary is scored by BOUND");
  }
  if (search.normalise == Normalise::kSoftmax) {
    violations.require(
        kind == SummaryKind::kCompressed, "search.normalise", "SOFTMAX needs a COMPRESSED summary");
    violations.require(search.query_reduce == QueryReduce::kNone,
                       "search.query_reduce",
                       "SOFTMAX is taken per query head, so the queries cannot be reduced");
    violations.require(search.query == QuerySource::kAttention,
                       "search.query",
                       "SOFTMAX needs the attention query, whose normaliser it shares");
  }
}

void check_block_selection(const Branch& branch, Violations& violations) {
  const SelectionSpec& selection = branch.selection;
  const SummarySpec& summary = branch.summary;
  violations.require(summary.kind != SummaryKind::kNone,
                     "summary.kind",
                     "TOP_K over blocks needs a summary to search");
  violations.require(is_block_size(selection.block_tokens), "selection.block_tokens", kBlockRule);
  if (summary.kind == SummaryKind::kCompressed && branch.search.normalise == Normalise::kSoftmax) {
    violations.require(
        summary.stride_tokens > 0 && selection.block_tokens % summary.stride_tokens == 0,
        "selection.block_tokens",
        "must be a multiple of summary.stride_tokens");
    // Then a window that a closed block shares with its predecessor is complete whenever the block
    // is.
    violations.require(summary.window_tokens - summary.stride_tokens <= selection.block_tokens,
                       "summary.window_tokens",
                       "must not exceed summary.stride_tokens + selection.block_tokens");
  } else if (summary.kind == SummaryKind::kCompressed) {
    violations.require(summary.window_tokens == selection.block_tokens &&
                           summary.stride_tokens == selection.block_tokens,
                       "selection.block_tokens",
                       "RAW scores need one entry a block: window_tokens = stride_tokens = "
                       "selection.block_tokens");
  } else if (summary.kind != SummaryKind::kNone) {
    violations.require(summary.block_tokens == selection.block_tokens,
                       "selection.block_tokens",
                       "must equal summary.block_tokens");
  }
  violations.require(
      selection.forced_first_blocks >= 0, "selection.forced_first_blocks", "must not be negative");
  violations.require(selection.forced_last_blocks >= 1,
                     "selection.forced_last_blocks",
                     "must be at least 1: the query's own block is always selected");
  violations.require(selection.span_power == Rational{} && selection.span_backward == Rational{} &&
                         selection.span_forward == Rational{},
                     "selection.spans",
                     "set although blocks are selected");
  violations.require(
      branch.search.anchor_power == Rational{} && branch.search.anchor_first_stripe == 0,
      "search.anchors",
      "set although the view is SUMMARY");
  check_score(branch, violations);
}

void check_amount(const Amount& amount,
                  bool spans,
                  absl::string_view field,
                  Violations& violations) {
  const auto path = [&](absl::string_view name) {
    return absl::StrCat("budget.", field, ".", name);
  };
  switch (amount.kind) {
    case Amount::Kind::kBlocks:
      violations.require(amount.value >= 1 && amount.value <= kMaxBudgetBlocks &&
                             amount.value == std::floor(amount.value),
                         path("blocks"),
                         absl::StrCat("must be a whole number from 1 to ", kMaxBudgetBlocks));
      break;
    case Amount::Kind::kTokens:
      violations.require(amount.value >= 1 && amount.value <= static_cast<double>(kMaxStaticTokens),
                         path("tokens"),
                         "must be positive");
      violations.require(!spans, path("tokens"), "spans are counted in blocks");
      break;
    case Amount::Kind::kRatio:
      violations.require(amount.value > 0 && amount.value <= 1, path("ratio"), "must be in (0, 1]");
      break;
  }
  violations.require(amount.min_blocks >= 0 && amount.min_blocks <= kMaxBudgetBlocks,
                     path("min_blocks"),
                     absl::StrCat("must be from 0 to ", kMaxBudgetBlocks));
  violations.require(amount.max_blocks >= 0 && amount.max_blocks <= kMaxBudgetBlocks,
                     path("max_blocks"),
                     absl::StrCat("must be from 0 to ", kMaxBudgetBlocks));
  violations.require(amount.max_blocks == 0 || amount.max_blocks >= amount.min_blocks,
                     path("max_blocks"),
                     "must not be below min_blocks");
}

void check_search(const Branch& branch, Violations& violations) {
  const SearchSpec& search = branch.search;
  if (branch.selection.spans || search.view == SearchView::kAnchor) {
    check_span_selection(branch, violations);
  } else {
    check_block_selection(branch, violations);
  }
  const bool group = search.head_reduce == HeadReduce::kGroupSum ||
                     search.head_reduce == HeadReduce::kGroupMean ||
                     search.head_reduce == HeadReduce::kGroupMax;
  violations.require(!group || search.query_reduce == QueryReduce::kNone,
                     "search.head_reduce",
                     "a reduced query leaves one score a KV head: nothing to reduce in a group");
  check_amount(branch.budget.prefill, branch.selection.spans, "prefill", violations);
  check_amount(branch.budget.decode, branch.selection.spans, "decode", violations);
}

void check_without_search(const Branch& branch, Violations& violations) {
  SelectionSpec unset;
  unset.kind = branch.selection.kind;
  violations.require(branch.search == SearchSpec{}, "search", "only a TOP_K selection searches");
  violations.require(
      branch.selection == unset, "selection", "blocks, spans and forced blocks belong to TOP_K");
  violations.require(branch.budget == Budget{}, "budget", "only a TOP_K selection has a budget");
}

void check_branch(const Branch& branch, Violations& violations) {
  check_summary(branch.summary, violations);
  violations.require(
      branch.mask.window_tokens >= 0 && branch.mask.window_tokens <= kMaxStaticTokens,
      "mask.window_tokens",
      absl::StrCat("must be from 0 to ", kMaxStaticTokens));
  violations.require(branch.mask.sink_tokens >= 0 && branch.mask.sink_tokens <= kMaxStaticTokens,
                     "mask.sink_tokens",
                     absl::StrCat("must be from 0 to ", kMaxStaticTokens));
  const bool has_mask = branch.mask != StaticMask{};
  if (branch.needs_search()) {
    check_search(branch, violations);
  } else {
    check_without_search(branch, violations);
  }
  if (branch.source == BranchSource::kSummaries) {
    violations.require(branch.summary.kind == SummaryKind::kCompressed,
                       "summary.kind",
                       "source SUMMARIES needs a COMPRESSED summary");
    violations.require(branch.selection.kind == SelectionKind::kNone,
                       "selection.kind",
                       "must be NONE with source SUMMARIES, which attends to all visible windows");
    violations.require(!has_mask, "mask", "source SUMMARIES has no static mask");
    return;
  }
  violations.require(branch.needs_search() || branch.summary.kind == SummaryKind::kNone,
                     "summary.kind",
                     "nothing reads this summary");
  violations.require(branch.selection.kind != SelectionKind::kNone || has_mask,
                     "mask",
                     "selection NONE needs a window or sinks");
  violations.require(branch.selection.kind != SelectionKind::kAll || !has_mask,
                     "mask",
                     "selection ALL contains every token already");
}

void check_merge(const Method& method, Violations& violations) {
  const bool spans = std::any_of(method.branches.begin(),
                                 method.branches.end(),
                                 [](const Branch& branch) { return branch.selection.spans; });
  switch (method.merge) {
    case MergeKind::kLse:
      violations.require(method.branches.size() <= 1,
                         "merge.kind",
                         "LSE joins one branch: the tokens of several could overlap");
      break;
    case MergeKind::kGates:
      break;
    case MergeKind::kSpanScores:
      violations.require(
          method.branches.size() == 1, "merge.kind", "SPAN_SCORES needs exactly one branch");
      violations.require(spans, "merge.kind", "SPAN_SCORES needs a branch that selects spans");
      break;
  }
  violations.require(!spans || method.merge == MergeKind::kSpanScores,
                     "merge.kind",
                     "a branch that selects spans is merged by SPAN_SCORES");
}

}  // namespace

std::vector<FieldViolation> validate(const Method& method) {
  Violations violations;
  violations.require(
      !method.branches.empty() && method.branches.size() <= kMaxBranches,
      "branches",
      absl::StrCat("needs from 1 to ", kMaxBranches, ", has ", method.branches.size()));
  check_merge(method, violations);
  std::set<int> layers;
  for (const int layer : method.dense_layers) {
    violations.require(layer >= 0, "roles.dense_layers", "must not be negative");
    violations.require(layers.insert(layer).second,
                       "roles.dense_layers",
                       absl::StrCat("names layer ", layer, " twice"));
  }
  violations.require(
      method.dense_below_tokens >= 0, "roles.dense_below_tokens", "must not be negative");
  for (size_t i = 0; i < method.branches.size(); ++i) {
    violations.set_path(absl::StrCat("branches[", i, "]"));
    check_branch(method.branches[i], violations);
  }
  return violations.take();
}

}  // namespace longspan
