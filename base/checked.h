// Size arithmetic that reports overflow: every size that a client influences goes through here
// before memory is taken.
#pragma once

#include <concepts>
#include <cstdint>
#include <optional>

namespace longspan {

// The product, or nothing when it does not fit in 63 bits or a factor is negative.
template <std::integral... Factors>
constexpr std::optional<int64_t> checked_product(Factors... factors) {
  int64_t product = 1;
  bool fits = true;
  const auto multiply = [&](int64_t factor) {
    fits = fits && factor >= 0 && !__builtin_mul_overflow(product, factor, &product);
  };
  (multiply(static_cast<int64_t>(factors)), ...);
  return fits ? std::optional<int64_t>(product) : std::nullopt;
}

// The sum, or nothing when it does not fit in 63 bits or a term is negative.
template <std::integral... Terms>
constexpr std::optional<int64_t> checked_sum(Terms... terms) {
  int64_t sum = 0;
  bool fits = true;
  const auto add = [&](int64_t term) {
    fits = fits && term >= 0 && !__builtin_add_overflow(sum, term, &sum);
  };
  (add(static_cast<int64_t>(terms)), ...);
  return fits ? std::optional<int64_t>(sum) : std::nullopt;
}

constexpr int64_t divide_up(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

}  // namespace longspan
