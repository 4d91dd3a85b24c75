#include "kernels/anchors.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace longspan {
namespace {

// Results saturate here, far above any context.
constexpr int64_t kSaturated = int64_t{1} << 38;

// Powers are estimated in double precision first, with a relative error below 1e-13. Where the
// estimate is closer than this to an integer, the exact comparison decides. Up to kSaturated that
// is less than half a token, so no other integer is in question.
constexpr double kDoubt = 1e-12;

// A product of 64-bit words as a natural number, least significant limb first.
class Product {
 public:
  void multiply_power(uint64_t base, int64_t exponent) {
    for (int64_t i = 0; i < exponent; ++i) {
      multiply(base);
    }
  }
  bool operator<=(const Product& other) const {
    if (limbs_.size() != other.limbs_.size()) {
      return limbs_.size() < other.limbs_.size();
    }
    return !std::lexicographical_compare(
        other.limbs_.rbegin(), other.limbs_.rend(), limbs_.rbegin(), limbs_.rend());
  }

 private:
  __extension__ using Wide = unsigned __int128;

  void multiply(uint64_t factor) {
    uint64_t carry = 0;
    for (uint64_t& limb : limbs_) {
      const Wide product = static_cast<Wide>(limb) * factor + carry;
      limb = static_cast<uint64_t>(product);
      carry = static_cast<uint64_t>(product >> 64);
    }
    if (carry != 0) {
      limbs_.push_back(carry);
    }
    while (!limbs_.empty() && limbs_.back() == 0) {
      limbs_.pop_back();
    }
  }

  std::vector<uint64_t> limbs_ = {1};  // zero has none
};

Product power(uint64_t base, int64_t exponent) {
  Product product;
  product.multiply_power(base, exponent);
  return product;
}

// root <= base^(1/p) with p = m/n: root^m <= base^n.
bool root_fits(int64_t root, int64_t base, Rational p) {
  return power(static_cast<uint64_t>(root), p.numerator) <=
         power(static_cast<uint64_t>(base), p.denominator);
}

// length >= (x/y) base^(m/n): x^n base^m <= (length y)^n.
bool length_suffices(int64_t length, Rational factor, int64_t base, Rational p) {
  Product needed;
  needed.multiply_power(static_cast<uint64_t>(factor.numerator), p.denominator);
  needed.multiply_power(static_cast<uint64_t>(base), p.numerator);
  Product reached;
  reached.multiply_power(static_cast<uint64_t>(length), p.denominator);
  reached.multiply_power(static_cast<uint64_t>(factor.denominator), p.denominator);
  return needed <= reached;
}

double ratio(Rational value) {
  return static_cast<double>(value.numerator) / static_cast<double>(value.denominator);
}

Rational reduced(Rational value) {
  const int64_t divisor = std::gcd(value.numerator, value.denominator);
  return {value.numerator / divisor, value.denominator / divisor};
}

// The integer that `estimate` may be within rounding error of, or -1.
int64_t doubtful_integer(double estimate) {
  const double nearest = std::round(estimate);
  return std::abs(estimate - nearest) <= kDoubt * estimate ? static_cast<int64_t>(nearest) : -1;
}

}  // namespace

StatusOr<Rational> rational_from_double(double value) {
  if (!(value >= 0 && value <= 1e6)) {
    return absl::InvalidArgumentError(absl::StrCat("must be between 0 and 1000000, got ", value));
  }
  for (int64_t denominator = 1; denominator <= kMaxDenominator; ++denominator) {
    const double numerator = std::round(value * static_cast<double>(denominator));
    if (std::abs(numerator / static_cast<double>(denominator) - value) <= 1e-9) {
      return Rational{static_cast<int64_t>(numerator), denominator};
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "must be a fraction with a denominator up to ", kMaxDenominator, ", got ", value));
}

int64_t floor_root(int64_t base, Rational power) {
  const Rational p = reduced(power);
  const double estimate = std::pow(static_cast<double>(base), 1.0 / ratio(p));
  if (!(estimate < static_cast<double>(kSaturated))) {
    return kSaturated;
  }
  const int64_t integer = doubtful_integer(estimate);
  if (integer < 0) {
    return static_cast<int64_t>(estimate);
  }
  return root_fits(integer, base, p) ? integer : integer - 1;
}

int64_t ceil_scaled_power(Rational factor, int64_t base, Rational power) {
  if (factor.numerator == 0 || base == 0) {
    return 0;
  }
  const Rational p = reduced(power);
  const Rational scale = reduced(factor);
  const double estimate = ratio(scale) * std::pow(static_cast<double>(base), ratio(p));
  if (!(estimate < static_cast<double>(kSaturated))) {
    return kSaturated;
  }
  const int64_t integer = doubtful_integer(estimate);
  if (integer < 0) {
    return static_cast<int64_t>(std::ceil(estimate));
  }
  return length_suffices(integer, scale, base, p) ? integer : integer + 1;
}

int64_t static_window(const Branch& branch) {
  return branch.search.view == SearchView::kAnchor
             ? floor_root(branch.search.anchor_first_stripe + 1, branch.search.anchor_power) - 1
             : branch.mask.window_tokens;
}

AnchorTable::AnchorTable(const SearchSpec& search)
    : power_(search.anchor_power), next_stripe_(search.anchor_first_stripe + 1) {}

std::span<const int64_t> AnchorTable::offsets(int64_t position) {
  const int64_t num_tokens = position + 1;
  while (offsets_.empty() || offsets_.back() <= num_tokens) {
    offsets_.push_back(floor_root(next_stripe_, power_));
    ++next_stripe_;
  }
  const auto end = std::upper_bound(offsets_.begin(), offsets_.end(), num_tokens);
  return {offsets_.data(), static_cast<size_t>(end - offsets_.begin())};
}

void AnchorTable::append_anchors(int64_t position, std::vector<int64_t>& out) {
  const std::span<const int64_t> distances = offsets(position);
  for (auto distance = distances.rbegin(); distance != distances.rend(); ++distance) {
    out.push_back(position + 1 - *distance);
  }
}

SpanReach span_reach(const SelectionSpec& selection, int64_t position) {
  return {ceil_scaled_power(selection.span_backward, position + 1, selection.span_power),
          ceil_scaled_power(selection.span_forward, position + 1, selection.span_power)};
}

Span span_around(SpanReach reach, int64_t anchor, int64_t position, int64_t window_tokens) {
  const int64_t window_begin = std::max<int64_t>(0, position + 1 - window_tokens);
  return {std::max<int64_t>(0, anchor - reach.backward),
          std::min({anchor + reach.forward + 1, position + 1, window_begin})};
}

}  // namespace longspan
