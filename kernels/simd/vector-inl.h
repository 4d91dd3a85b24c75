// What the loops of a target share: its vectors, loads of every cache type, exp and tanh.
//
// The -inl.h files are compiled once for each target (target_*.cc), which is why everything in them
// is in an unnamed namespace: the linker must never share a function between targets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

#include "base/data_type.h"

#ifdef LONGSPAN_SIMD_BF16_DOT
#define LONGSPAN_BEFORE_TARGET() \
  HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16") static_assert(true, "")
#else
#define LONGSPAN_BEFORE_TARGET() HWY_BEFORE_NAMESPACE()
#endif
#define LONGSPAN_AFTER_TARGET() HWY_AFTER_NAMESPACE()

LONGSPAN_BEFORE_TARGET();
namespace longspan::simd {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Words = hn::ScalableTag<uint32_t>;
using FloatVector = hn::Vec<Floats>;
inline constexpr size_t kLanes = HWY_LANES(float);
// Vectors are 8 or 16 floats and rows of keys and values multiples of 8: this is the rest.
using Eight = hn::CappedTag<float, 8>;

static_assert(sizeof(hwy::bfloat16_t) == 2 && sizeof(hwy::float16_t) == 2);

template <class D>
HWY_INLINE hn::Vec<D> load_floats(D d, const float* data) {
  return hn::LoadU(d, data);
}
template <class D>
HWY_INLINE hn::Vec<D> load_floats(D d, const hwy::bfloat16_t* data) {
  const hn::Rebind<uint16_t, D> halves;
  const hn::Rebind<uint32_t, D> words;
  const auto bits = hn::LoadU(halves, reinterpret_cast<const uint16_t*>(data));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(words, bits)));
}
template <class D>
HWY_INLINE hn::Vec<D> load_floats(D d, const hwy::float16_t* data) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::float16_t, D>(), data));
}

// Calls kernel(typed pointer) for the type of the elements at `data`.
template <class Kernel>
HWY_INLINE void with_type(DataType dtype, const std::byte* data, const Kernel& kernel) {
  switch (dtype) {
    case DataType::kFloat32:
      kernel(reinterpret_cast<const float*>(data));
      return;
    case DataType::kFloat16:
      kernel(reinterpret_cast<const hwy::float16_t*>(data));
      return;
    case DataType::kBFloat16:
      kernel(reinterpret_cast<const hwy::bfloat16_t*>(data));
      return;
  }
}

// e^x within 2e-7 relative; 0 below -87.33, where floats become subnormal; NaN stays NaN. Reduction
// to |r| <= ln(2)/2 and a minimax polynomial of degree 6 (relative error 2e-9 before rounding).
HWY_INLINE FloatVector exponential(Floats d, FloatVector x) {
  const Words words;
  const FloatVector lowest = hn::Set(d, -87.33F);
  const auto underflow = hn::Lt(x, lowest);
  x = hn::Min(hn::Set(d, 88.0F), x);  // in this order NaN passes through
  // Adding 1.5 * 2^23 rounds to an integer n in the low bits of the sum; 127 more makes them the
  // biased exponent of 2^n.
  const FloatVector shifter = hn::Set(d, 12582912.0F + 127.0F);
  const FloatVector shifted = hn::MulAdd(x, hn::Set(d, 1.44269504F), shifter);
  const FloatVector n = hn::Sub(shifted, shifter);
  FloatVector r = hn::NegMulAdd(n, hn::Set(d, 0.693145751953125F), x);  // ln 2 in two parts
  r = hn::NegMulAdd(n, hn::Set(d, 1.42860682e-6F), r);
  FloatVector p = hn::Set(d, 0.0013838205F);
  p = hn::MulAdd(p, r, hn::Set(d, 0.0083749555F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.041668206F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.16666418F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.49999991F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F));
  const FloatVector power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(words, shifted)));
  return hn::IfThenZeroElse(underflow, hn::Mul(p, power));
}

// tanh x: odd Taylor terms to x^9 where |x| < 0.3 (so that small logits keep their precision under
// a soft cap), 1 - 2 / (e^2x + 1) beyond.
HWY_INLINE FloatVector hyperbolic_tangent(Floats d, FloatVector x) {
  const FloatVector square = hn::Mul(x, x);
  FloatVector p = hn::Set(d, 62.0F / 2835.0F);
  p = hn::MulAdd(p, square, hn::Set(d, -17.0F / 315.0F));
  p = hn::MulAdd(p, square, hn::Set(d, 2.0F / 15.0F));
  p = hn::MulAdd(p, square, hn::Set(d, -1.0F / 3.0F));
  const FloatVector near = hn::MulAdd(hn::Mul(p, square), x, x);
  const FloatVector one = hn::Set(d, 1.0F);
  const FloatVector e = exponential(d, hn::Add(x, x));
  const FloatVector far = hn::Sub(one, hn::Div(hn::Set(d, 2.0F), hn::Add(e, one)));
  return hn::IfThenElse(hn::Lt(hn::Abs(x), hn::Set(d, 0.3F)), near, far);
}

// Raw dot products to logits; a soft cap of 0 is none.
struct LogitScale {
  FloatVector scale;
  FloatVector soft_cap;
  FloatVector inverse_cap;
  bool capped;

  HWY_INLINE LogitScale(float scale_, float soft_cap_) : capped(soft_cap_ > 0.0F) {
    const Floats d;
    scale = hn::Set(d, scale_);
    soft_cap = hn::Set(d, soft_cap_);
    inverse_cap = hn::Set(d, capped ? 1.0F / soft_cap_ : 0.0F);
  }
  HWY_INLINE FloatVector operator()(FloatVector dot) const {
    const Floats d;
    const FloatVector logit = hn::Mul(dot, scale);
    return capped ? hn::Mul(soft_cap, hyperbolic_tangent(d, hn::Mul(logit, inverse_cap))) : logit;
  }
};

}  // namespace
}  // namespace longspan::simd
LONGSPAN_AFTER_TARGET();
