#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/reference/stages.h"

namespace longspan::reference {
namespace {

constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();

// One row by log-sum-exp. A NaN in any part's lse makes the row NaN.
void merge_row(const MergeParams& params, int64_t row) {
  const double sink = params.sink_logits == nullptr ? kNegativeInfinity : params.sink_logits[row];
  double maximum = sink;
  for (int part = 0; part < params.num_parts; ++part) {
    maximum = std::fmax(maximum, params.part_lse[part][row]);
  }
  const auto weight = [&](double lse) {
    return lse == kNegativeInfinity ? 0.0 : std::exp(lse - maximum);
  };
  double total = weight(sink);
  std::vector<double> sums(static_cast<size_t>(params.value_dim), 0.0);
  for (int part = 0; part < params.num_parts; ++part) {
    const double part_weight = weight(params.part_lse[part][row]);
    total += part_weight;
    if (part_weight == 0.0) {
      continue;  // an empty part's output does not count, whatever it holds
    }
    for (int e = 0; e < params.value_dim; ++e) {
      sums[static_cast<size_t>(e)] +=
          part_weight * params.part_out[part][row * params.value_dim + e];
    }
  }
  for (int e = 0; e < params.value_dim; ++e) {
    const double sum = sums[static_cast<size_t>(e)];
    params.out[row * params.value_dim + e] = static_cast<float>(total == 0.0 ? 0.0 : sum / total);
  }
  params.lse[row] =
      static_cast<float>(total == 0.0 ? kNegativeInfinity : maximum + std::log(total));
}

void weigh_row(const MergeParams& params, int64_t row) {
  for (int e = 0; e < params.value_dim; ++e) {
    double sum = 0.0;
    for (int part = 0; part < params.num_parts; ++part) {
      sum += static_cast<double>(params.weights[part][row]) *
             params.part_out[part][row * params.value_dim + e];
    }
    params.out[row * params.value_dim + e] = static_cast<float>(sum);
  }
}

}  // namespace

void merge(const MergeParams& params) {
  for (int64_t row = 0; row < params.num_rows; ++row) {
    if (params.weights == nullptr) {
      merge_row(params, row);
    } else {
      weigh_row(params, row);
    }
  }
}

}  // namespace longspan::reference
