// A sparse attention method as data: what the pipeline summarizes, searches, selects, attends to
// and merges.
//
// This is the part of the wire's Method (proto/longspan/v1/method.proto) that is served;
// worker/codec refuses the rest with its reasons. Sources of the formulas: docs/methods.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/page.h"

namespace longspan {

enum class SummaryKind : uint8_t { kNone, kMean, kMinMax, kCompressed };

// What is kept beside the keys. Entry e covers tokens [e * stride(), e * stride() + span()).
struct SummarySpec {
  SummaryKind kind = SummaryKind::kNone;
  int block_tokens = 0;               // kMean, kMinMax
  int window_tokens = 0;              // kCompressed: l
  int stride_tokens = 0;              // kCompressed: d
  std::vector<float> key_weights;     // kCompressed: l weights; empty: 1/l each
  std::vector<float> value_weights;   // kCompressed: l weights; empty: the same as for keys
  bool scale_by_sqrt_length = false;  // kMean: multiply by sqrt(block_tokens)

  bool operator==(const SummarySpec&) const = default;

  int stride() const { return kind == SummaryKind::kCompressed ? stride_tokens : block_tokens; }
  int span() const { return kind == SummaryKind::kCompressed ? window_tokens : block_tokens; }
  // Entries wholly inside the first `num_tokens` tokens. C(t) of NSA is num_entries(t + 1).
  int64_t num_entries(int64_t num_tokens) const {
    return num_tokens < span() ? 0 : (num_tokens - span()) / stride() + 1;
  }
};

enum class QuerySource : uint8_t { kAttention, kSupplied };
enum class QueryReduce : uint8_t { kNone, kGroupMean, kAllMean };
enum class SearchView : uint8_t { kSummary, kAnchor };
enum class ScoreKind : uint8_t { kDot, kBound };
enum class Normalise : uint8_t { kRaw, kSoftmax };
enum class HeadReduce : uint8_t {
  kNone,
  kGroupSum,
  kGroupMean,
  kGroupMax,
  kAllSum,
  kAllMean,
  kAllMax
};

// An exact rational; powers and factors of span search are held so, to keep its tables in integer
// arithmetic.
struct Rational {
  int64_t numerator = 0;
  int64_t denominator = 1;
  bool operator==(const Rational&) const = default;
};

struct SearchSpec {
  QuerySource query = QuerySource::kAttention;
  QueryReduce query_reduce = QueryReduce::kNone;
  SearchView view = SearchView::kSummary;
  ScoreKind score = ScoreKind::kDot;
  // kSoftmax: p = exp(scale q.k - lse), lse over all visible entries of the query head; then the
  // windows that overlap a block are summed with weight overlap / stride (NSA eq. 8 and 9). Needs a
  // kCompressed summary.
  Normalise normalise = Normalise::kRaw;
  HeadReduce head_reduce = HeadReduce::kNone;
  // kAnchor: anchors of query t at t + 1 - floor(i^(1/power)), i > first_stripe. The static window
  // of the branch is floor((first_stripe + 1)^(1/power)) - 1 tokens, so that the first anchor is
  // the token just before it.
  Rational anchor_power;
  int64_t anchor_first_stripe = 0;

  bool operator==(const SearchSpec&) const = default;
};

enum class SelectionKind : uint8_t { kNone, kAll, kTopK };

struct SelectionSpec {
  SelectionKind kind = SelectionKind::kNone;
  int block_tokens = 0;
  int forced_first_blocks = 0;
  int forced_last_blocks = 1;  // the query's own block included; at least 1
  bool forced_within_budget = false;
  // Spans around anchors instead of blocks (search.view == kAnchor). Inclusive span of anchor a for
  // query t, N = t + 1: [max(0, a - ceil(backward N^power)), min(a + ceil(forward N^power), t,
  // window start - 1)].
  bool spans = false;
  Rational span_power;
  Rational span_backward;
  Rational span_forward;

  bool operator==(const SelectionSpec&) const = default;
};

// Causal always. Tokens attended to whatever the search says.
struct StaticMask {
  int64_t window_tokens = 0;  // the last ones, the query's own included
  int64_t sink_tokens = 0;    // the first ones
  bool operator==(const StaticMask&) const = default;
};

enum class Phase : uint8_t { kPrefill, kDecode };

struct Amount {
  enum class Kind : uint8_t { kBlocks, kTokens, kRatio };
  Kind kind = Kind::kBlocks;
  double value = 0;
  int64_t min_blocks = 0;
  int64_t max_blocks = 0;  // 0: no bound
  bool operator==(const Amount&) const = default;

  // Blocks (or spans) for a query that sees `visible_blocks` blocks of `block_tokens`.
  int64_t blocks(int64_t visible_blocks, int64_t block_tokens) const;
};

struct Budget {
  Amount prefill;
  Amount decode;
  bool operator==(const Budget&) const = default;
  const Amount& amount(Phase phase) const { return phase == Phase::kPrefill ? prefill : decode; }
};

enum class BranchSource : uint8_t { kTokens, kSummaries };

struct Branch {
  std::string name;
  BranchSource source = BranchSource::kTokens;
  SummarySpec summary;
  SearchSpec search;
  SelectionSpec selection;
  StaticMask mask;
  Budget budget;
  bool operator==(const Branch&) const = default;

  bool needs_search() const { return selection.kind == SelectionKind::kTopK; }
};

enum class MergeKind : uint8_t { kLse, kGates, kSpanScores };

struct Method {
  std::string name;
  std::vector<Branch> branches;
  MergeKind merge = MergeKind::kLse;
  std::vector<int> dense_layers;
  bool dense_prefill = false;
  bool dense_decode = false;
  int64_t dense_below_tokens = 0;
  bool operator==(const Method&) const = default;

  bool needs_gates() const { return merge == MergeKind::kGates; }
  bool needs_search_query() const;
  // Whether the output has a log-sum-exp: gated and score-weighted mixtures have none.
  bool has_lse() const { return merge == MergeKind::kLse; }
  // Distinct summaries of all branches.
  std::vector<SummarySpec> summaries() const;
  // Selection and ownership must not cut a block: the least common multiple of the page and every
  // block, in tokens.
  int64_t alignment_tokens() const;
};

// Dense attention: one branch, everything selected.
Method dense_method();

// The method that applies to a call: `method`, or dense where its roles say so. `num_tokens` is
// what the last row sees.
const Method& effective_method(const Method& method, int layer, Phase phase, int64_t num_tokens);

// Every reason why a method is not well-formed, each naming the field
// (`branches[0].selection.block_tokens: ...`).
struct FieldViolation {
  std::string field;
  std::string description;
};
std::vector<FieldViolation> validate(const Method& method);

// Rows of selection lists a query row has: every query head its own (H), one a KV head, or one for
// all.
int num_selection_heads(const SearchSpec& search, int num_query_heads, int num_kv_heads);

}  // namespace longspan
