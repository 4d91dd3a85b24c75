// log(sum of exp(part)), natural, over a few partial normalisers; -inf where all of them are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace longspan {

// `parts` are `stride` elements apart.
inline float log_sum_exp(const float* parts, size_t num_parts, size_t stride) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  float maximum = kLowest;
  for (size_t part = 0; part < num_parts; ++part) {
    maximum = std::max(maximum, parts[part * stride]);
  }
  if (maximum == kLowest) {
    return kLowest;
  }
  double total = 0;
  for (size_t part = 0; part < num_parts; ++part) {
    total += std::exp(static_cast<double>(parts[part * stride]) - maximum);
  }
  return static_cast<float>(maximum + std::log(total));
}

}  // namespace longspan
