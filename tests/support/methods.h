// The published methods as the tests use them, with sizes that short contexts can exercise.
#pragma once

#include <string>
#include <vector>

#include "kernels/method.h"

namespace longspan::testing {

Method window_method(int64_t window_tokens, int64_t sink_tokens);
// Means of `block_tokens` keys, a choice for each query head; the query's own block is in the
// budget.
Method moba_method(int block_tokens, int blocks);
// The mean of a group's queries against means of keys; the budget is for scored blocks alone.
Method kinetics_method(int block_tokens, int blocks);
// Bounds from channelwise extremes, a choice for each query head.
Method quest_method(int block_tokens, int blocks);
// Compressed, selected and window branches with gates. The paper: l = 32, d = 16, B = 64, n = 16,
// window 512. Three forced blocks are in the budget.
Method nsa_method(int window, int stride, int block_tokens, int blocks, int64_t window_tokens);
// Span search: power p = q, spans of b and f, k spans, anchors after `first_stripe`.
struct SpanSearch {
  Rational power{1, 2};
  Rational backward{2, 1};
  Rational forward{0, 1};
  int spans = 2;
  int64_t first_stripe = 0;
};
Method superlinear_method(const SpanSearch& search);
// Sinks, a window and top-k blocks shared by a group, with a budget for each phase.
Method a_shape_method(int block_tokens, int prefill_blocks, int decode_blocks);

// One of each, small.
std::vector<Method> all_methods();

}  // namespace longspan::testing
