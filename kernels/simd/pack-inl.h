// Keys and values of one page and KV head, laid out so that both products of attention are the
// product of multiply-inl.h: keys transposed to [channel][64 tokens], values as [token][channel].
//
// A word is what one multiply-add takes from each side: a float, or a pair of bf16 (then there are
// half as many channels, or half as many tokens).
#pragma once

#include <cstring>

#include "kernels/params.h"
#include "kernels/simd/vector-inl.h"

LONGSPAN_BEFORE_TARGET();
namespace longspan::simd {
namespace {

// Four words of each of as many rows as d has lanes: part b (of 128 bits) of the vector for
// rows + j * row_words is row 4 b + j.
template <class D>
HWY_INLINE hn::Vec<D> load_row_quads(D d, const float* rows, size_t row_words) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    return hn::LoadU(d, rows);
  } else {
    const hn::Half<D> half;
    const size_t upper_rows = hn::MaxLanes(D()) / 2;
    return hn::Combine(d,
                       load_row_quads(half, rows + upper_rows * row_words, row_words),
                       load_row_quads(half, rows, row_words));
  }
}

// rows [64][row_words] -> out [row_words][64]; row_words is a multiple of 4.
HWY_INLINE void transpose_page(const float* HWY_RESTRICT rows,
                               size_t row_words,
                               float* HWY_RESTRICT out) {
  const Floats d;
  const hn::Repartition<double, Floats> pairs;
  for (size_t token = 0; token < kPageTokens; token += kLanes) {
    const float* from = rows + token * row_words;
    for (size_t word = 0; word < row_words; word += 4, from += 4) {
      const FloatVector r0 = load_row_quads(d, from, row_words);
      const FloatVector r1 = load_row_quads(d, from + row_words, row_words);
      const FloatVector r2 = load_row_quads(d, from + 2 * row_words, row_words);
      const FloatVector r3 = load_row_quads(d, from + 3 * row_words, row_words);
      const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(d, r0, r1));
      const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(d, r2, r3));
      const auto high01 = hn::BitCast(pairs, hn::InterleaveUpper(d, r0, r1));
      const auto high23 = hn::BitCast(pairs, hn::InterleaveUpper(d, r2, r3));
      float* to = out + word * kPageTokens + token;
      hn::Store(hn::BitCast(d, hn::InterleaveLower(pairs, low01, low23)), d, to);
      hn::Store(hn::BitCast(d, hn::InterleaveUpper(pairs, low01, low23)), d, to + kPageTokens);
      hn::Store(
          hn::BitCast(d, hn::InterleaveLower(pairs, high01, high23)), d, to + 2 * kPageTokens);
      hn::Store(
          hn::BitCast(d, hn::InterleaveUpper(pairs, high01, high23)), d, to + 3 * kPageTokens);
    }
  }
}

struct Widen {
  float* out;
  size_t count;  // a multiple of 64

  template <class T>
  HWY_INLINE void operator()(const T* data) const {
    const Floats d;
    for (size_t i = 0; i < count; i += 2 * kLanes) {
      const FloatVector first = load_floats(d, data + i);
      const FloatVector second = load_floats(d, data + i + kLanes);
      hn::Store(first, d, out + i);
      hn::Store(second, d, out + i + kLanes);
    }
  }
};

// data [64][dim] of any type -> out [dim][64] floats; `scratch` [64][dim].
inline void pack_transposed(
    DataType dtype, const std::byte* data, size_t dim, float* scratch, float* out) {
  if (dtype == DataType::kFloat32) {
    transpose_page(reinterpret_cast<const float*>(data), dim, out);
    return;
  }
  with_type(dtype, data, Widen{scratch, kPageTokens * dim});
  transpose_page(scratch, dim, out);
}

struct PackValues {
  size_t num_tokens;
  size_t dim;
  size_t padded_dim;  // a multiple of 16
  float* out;         // [64][padded_dim], zero where there is no value
  bool* finite;

  template <class T>
  HWY_INLINE void operator()(const T* data) const {
    const Floats d;
    const Eight eight;
    FloatVector check = hn::Zero(d);  // becomes NaN at the first value that is not finite
    auto check_rest = hn::Zero(eight);
    for (size_t token = 0; token < num_tokens; ++token) {
      const T* row = data + token * dim;
      float* to = out + token * padded_dim;
      size_t channel = 0;
      for (; channel + kLanes <= dim; channel += kLanes) {
        const FloatVector value = load_floats(d, row + channel);
        check = hn::MulAdd(value, hn::Zero(d), check);
        hn::Store(value, d, to + channel);
      }
      for (; channel < dim; channel += 8) {
        const auto value = load_floats(eight, row + channel);
        check_rest = hn::MulAdd(value, hn::Zero(eight), check_rest);
        hn::Store(value, eight, to + channel);
      }
      for (; channel < padded_dim; channel += 8) {
        hn::Store(hn::Zero(eight), eight, to + channel);
      }
    }
    std::memset(
        out + num_tokens * padded_dim, 0, (kPageTokens - num_tokens) * padded_dim * sizeof(float));
    *finite = hn::AllFalse(d, hn::IsNaN(check)) && hn::AllFalse(eight, hn::IsNaN(check_rest));
  }
};

// values [num_tokens][dim] of any type -> out [64][padded_dim]; returns whether all are finite.
inline bool pack_values(DataType dtype,
                        const std::byte* data,
                        size_t num_tokens,
                        size_t dim,
                        size_t padded_dim,
                        float* out) {
  bool finite = true;
  with_type(dtype, data, PackValues{num_tokens, dim, padded_dim, out, &finite});
  return finite;
}

#ifdef LONGSPAN_SIMD_BF16_DOT
// bf16 values [num_tokens][dim] -> out [32][padded_dim] words of two successive tokens; returns
// whether all are finite.
inline bool pack_value_pairs(const uint16_t* HWY_RESTRICT data,
                             size_t num_tokens,
                             size_t dim,
                             size_t padded_dim,
                             float* HWY_RESTRICT out) {
  const hn::CappedTag<uint32_t, 8> words;
  const hn::Rebind<uint16_t, decltype(words)> halves;
  const hn::Repartition<uint16_t, decltype(words)> all_halves;
  const auto magnitude_bits = hn::Set(all_halves, 0x7fff);
  auto largest = hn::Zero(all_halves);
  auto* word_out = reinterpret_cast<uint32_t*>(out);
  const size_t num_pairs = (num_tokens + 1) / 2;
  for (size_t pair = 0; pair < num_pairs; ++pair) {
    const uint16_t* row = data + 2 * pair * dim;
    const bool has_second = 2 * pair + 1 < num_tokens;
    uint32_t* to = word_out + pair * padded_dim;
    size_t channel = 0;
    for (; channel < dim; channel += 8) {
      const auto first = hn::PromoteTo(words, hn::LoadU(halves, row + channel));
      const auto second = has_second ? hn::PromoteTo(words, hn::LoadU(halves, row + dim + channel))
                                     : hn::Zero(words);
      const auto both = hn::Or(first, hn::ShiftLeft<16>(second));
      largest = hn::Max(largest, hn::And(hn::BitCast(all_halves, both), magnitude_bits));
      hn::StoreU(both, words, to + channel);
    }
    for (; channel < padded_dim; channel += 8) {
      hn::StoreU(hn::Zero(words), words, to + channel);
    }
  }
  std::memset(word_out + num_pairs * padded_dim, 0, (kPageTokens / 2 - num_pairs) * padded_dim * 4);
  return hn::AllTrue(all_halves, hn::Lt(largest, hn::Set(all_halves, 0x7f80)));
}
#endif

}  // namespace
}  // namespace longspan::simd
LONGSPAN_AFTER_TARGET();
