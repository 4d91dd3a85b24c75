#include "tests/support/compare.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace longspan::testing {
namespace {

std::vector<double> widen(std::span<const float> values) { return {values.begin(), values.end()}; }

// The first place where one is finite and the other is not, or both are different infinities.
::testing::AssertionResult same_finiteness(std::span<const float> actual,
                                           std::span<const double> reference) {
  if (actual.size() != reference.size()) {
    return ::testing::AssertionFailure()
           << actual.size() << " elements, the reference has " << reference.size();
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    const double value = actual[i];
    const bool both_finite = std::isfinite(value) && std::isfinite(reference[i]);
    const bool both_nan = std::isnan(value) && std::isnan(reference[i]);
    if (!both_finite && !both_nan && value != reference[i]) {
      return ::testing::AssertionFailure()
             << "element " << i << " is " << value << ", the reference has " << reference[i];
    }
  }
  return ::testing::AssertionSuccess();
}

double squared_difference(float value, double reference) {
  const double difference = double{value} - reference;
  return std::isfinite(reference) ? difference * difference : 0.0;
}

}  // namespace

Tolerance tolerance(DataType kv_dtype) {
  switch (kv_dtype) {
    case DataType::kFloat32:
      return {1e-5, 1e-3};
    case DataType::kFloat16:
      return {2e-3, 1e-3};
    case DataType::kBFloat16:
      return {4e-3, 1e-3};
  }
  return {};
}

::testing::AssertionResult outputs_match(std::span<const float> out,
                                         std::span<const double> reference,
                                         size_t row_size,
                                         Tolerance tolerance) {
  if (auto same = same_finiteness(out, reference); !same) {
    return same;
  }
  double total_error = 0;
  double total_length = 0;
  double worst_row_error = 0;
  size_t worst_row = 0;
  for (size_t begin = 0; begin < out.size(); begin += row_size) {
    double row_error = 0;
    for (size_t i = begin; i < std::min(begin + row_size, out.size()); ++i) {
      row_error += squared_difference(out[i], reference[i]);
      total_length += std::isfinite(reference[i]) ? reference[i] * reference[i] : 0.0;
    }
    total_error += row_error;
    if (row_error > worst_row_error) {
      worst_row_error = row_error;
      worst_row = begin / row_size;
    }
  }
  if (total_error == 0) {
    return ::testing::AssertionSuccess();
  }
  const double num_rows =
      std::ceil(static_cast<double>(out.size()) / static_cast<double>(row_size));
  const double relative = std::sqrt(total_error / total_length);
  const double worst_relative = std::sqrt(worst_row_error / (total_length / num_rows));
  if (relative <= tolerance.out && worst_relative <= 8 * tolerance.out) {
    return ::testing::AssertionSuccess();
  }
  size_t worst = worst_row * row_size;
  for (size_t i = worst; i < std::min((worst_row + 1) * row_size, out.size()); ++i) {
    if (squared_difference(out[i], reference[i]) >
        squared_difference(out[worst], reference[worst])) {
      worst = i;
    }
  }
  return ::testing::AssertionFailure()
         << "relative error " << relative << " (tolerance " << tolerance.out << "), worst row "
         << worst_row << " has " << worst_relative << "; its element "
         << worst - worst_row * row_size << " is " << out[worst] << ", the reference has "
         << reference[worst];
}

::testing::AssertionResult outputs_match(std::span<const float> out,
                                         std::span<const float> reference,
                                         size_t row_size,
                                         Tolerance tolerance) {
  return outputs_match(out, std::span<const double>(widen(reference)), row_size, tolerance);
}

::testing::AssertionResult lse_match(std::span<const float> lse,
                                     std::span<const double> reference,
                                     Tolerance tolerance) {
  if (auto same = same_finiteness(lse, reference); !same) {
    return same;
  }
  size_t worst = 0;
  for (size_t i = 0; i < lse.size(); ++i) {
    if (squared_difference(lse[i], reference[i]) >
        squared_difference(lse[worst], reference[worst])) {
      worst = i;
    }
  }
  if (lse.empty() ||
      squared_difference(lse[worst], reference[worst]) <= tolerance.lse * tolerance.lse) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure()
         << "lse " << worst << " is " << lse[worst] << ", the reference has " << reference[worst];
}

::testing::AssertionResult lse_match(std::span<const float> lse,
                                     std::span<const float> reference,
                                     Tolerance tolerance) {
  return lse_match(lse, std::span<const double>(widen(reference)), tolerance);
}

}  // namespace longspan::testing
