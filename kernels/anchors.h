// The anchors and spans of span search in exact integer arithmetic: floating-point powers may be
// one token off, and two machines then disagree about what was selected.
//
// Formulas: Superlinear multi-step attention (arXiv 2601.18401), as docs/methods.md gives them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/method.h"
#include "kernels/params.h"

namespace longspan {

inline constexpr int64_t kMaxDenominator = 1000;

// The fraction with the smallest denominator, up to 1000, that is within 1e-9 of `value`.
// INVALID_ARGUMENT when there is none.
StatusOr<Rational> rational_from_double(double value);

// floor(base^(1/power)) and ceil(factor * base^power), exact for base >= 0, power in (0, 1] and
// factor >= 0; results above 2^38 saturate there.
int64_t floor_root(int64_t base, Rational power);
int64_t ceil_scaled_power(Rational factor, int64_t base, Rational power);

// Tokens of the static window of a branch, the query's own included: the mask's, or for anchors
// what the first stripe implies.
int64_t static_window(const Branch& branch);

// Distances from the end of what a query sees to its anchors, in ascending order; grows as longer
// contexts ask. Anchors move with the query, the distances do not. One thread at a time.
class AnchorTable {
 public:
  explicit AnchorTable(const SearchSpec& search);

  // The anchors of a query at `position` are position + 1 - offset, for these offsets: descending
  // positions. Valid until the next call.
  std::span<const int64_t> offsets(int64_t position);
  // The same as ascending positions, appended to `out`.
  void append_anchors(int64_t position, std::vector<int64_t>& out);

 private:
  Rational power_;
  int64_t next_stripe_;
  std::vector<int64_t> offsets_;
};

// How far spans reach around the anchors of a query at `position`.
struct SpanReach {
  int64_t backward = 0;
  int64_t forward = 0;
};
SpanReach span_reach(const SelectionSpec& selection, int64_t position);

// The span around `anchor` for a query at `position` with a static window of `window_tokens`:
// inclusive [max(0, anchor - backward), min(anchor + forward, position, window start - 1)].
Span span_around(SpanReach reach, int64_t anchor, int64_t position, int64_t window_tokens);

}  // namespace longspan
