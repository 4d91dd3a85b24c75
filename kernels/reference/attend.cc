#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/reference/stages.h"

namespace longspan::reference {
namespace {

double logit(const AttendParams& params, const float* query, const std::byte* key) {
  double dot = 0.0;
  for (int d = 0; d < params.kv.key_dim; ++d) {
    dot +=
        static_cast<double>(query[d]) * load_element(params.kv.dtype, key, static_cast<size_t>(d));
  }
  const double scaled = dot * params.scale;
  return params.soft_cap > 0.0F ? params.soft_cap * std::tanh(scaled / params.soft_cap) : scaled;
}

// Softmax attention of one query head over its spans; `logits` and `sums` are scratch.
void attend_head(const AttendParams& params,
                 int64_t row,
                 int head,
                 std::vector<double>& logits,
                 std::vector<double>& sums) {
  const int64_t query_row = params.row_query == nullptr ? row : params.row_query[row];
  const float* query =
      params.query + (query_row * params.num_query_heads + head) * params.kv.key_dim;
  const int kv_head = head * params.kv.num_kv_heads / params.num_query_heads;
  const int64_t list = row * params.num_selection_heads + static_cast<int64_t>(head) *
                                                              params.num_selection_heads /
                                                              params.num_query_heads;
  const Span* begin = params.spans + params.span_offsets[list];
  const Span* end = params.spans + params.span_offsets[list + 1];

  logits.clear();
  double maximum = -std::numeric_limits<double>::infinity();
  bool has_nan = false;
  for (const Span* span = begin; span != end; ++span) {
    for (int64_t token = span->begin; token < span->end; ++token) {
      logits.push_back(logit(params, query, params.kv.key(token, kv_head)));
      maximum = std::fmax(maximum, logits.back());
      has_nan = has_nan || std::isnan(logits.back());
    }
  }
  // Nothing to attend to, or nothing that has any weight.
  const bool empty = maximum == -std::numeric_limits<double>::infinity() && !has_nan;
  double total = 0.0;
  std::fill(sums.begin(), sums.end(), 0.0);
  size_t index = 0;
  for (const Span* span = begin; span != end && !empty; ++span) {
    for (int64_t token = span->begin; token < span->end; ++token) {
      const double weight = std::exp(logits[index++] - maximum);
      total += weight;
      const std::byte* value = params.kv.value(token, kv_head);
      for (size_t e = 0; params.out != nullptr && e < sums.size(); ++e) {
        sums[e] += weight * load_element(params.kv.dtype, value, e);
      }
    }
  }
  const int64_t out_row = row * params.num_query_heads + head;
  params.lse[out_row] = static_cast<float>(empty ? maximum : maximum + std::log(total));
  for (size_t e = 0; params.out != nullptr && e < sums.size(); ++e) {
    params.out[out_row * params.kv.value_dim + static_cast<int64_t>(e)] =
        static_cast<float>(empty ? 0.0 : sums[e] / total);
  }
}

}  // namespace

void attend(const AttendParams& params) {
  std::vector<double> logits;
  std::vector<double> sums(static_cast<size_t>(params.kv.value_dim));
  for (int64_t row = 0; row < params.num_rows; ++row) {
    for (int head = 0; head < params.num_query_heads; ++head) {
      attend_head(params, row, head, logits, sums);
    }
  }
}

}  // namespace longspan::reference
