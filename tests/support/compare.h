// Comparison of a result with its reference: first where either is infinite or not a number, then
// the distance, and the worst place in words.
#pragma once

#include <cstddef>
#include <span>

#include "gtest/gtest.h"

#include "base/data_type.h"

namespace longspan::testing {

struct Tolerance {
  double out = 0;  // of |out - ref| / |ref|, Euclidean norms
  double lse = 0;  // of |lse - ref|, absolute
};
// What docs/numerics.md promises for caches of a type.
Tolerance tolerance(DataType kv_dtype);

// Rows of `row_size` elements. Infinities must be equal, NaN fails unless the reference is NaN in
// the same place, the whole must be within tolerance.out, and no row may be 8 times worse than that
// (measured by the mean length of a row, so that one wrong row cannot hide among many).
::testing::AssertionResult outputs_match(std::span<const float> out,
                                         std::span<const double> reference,
                                         size_t row_size,
                                         Tolerance tolerance);
::testing::AssertionResult outputs_match(std::span<const float> out,
                                         std::span<const float> reference,
                                         size_t row_size,
                                         Tolerance tolerance);

::testing::AssertionResult lse_match(std::span<const float> lse,
                                     std::span<const double> reference,
                                     Tolerance tolerance);
::testing::AssertionResult lse_match(std::span<const float> lse,
                                     std::span<const float> reference,
                                     Tolerance tolerance);

}  // namespace longspan::testing
