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

inline constexpr size_t kLineBytes = 64;

// Asks for one row of the page that comes next while this one is taken apart: arithmetic and memory
// then overlap, which the hardware does not see to across pages.
HWY_INLINE void prefetch_row(const std::byte* next, size_t num_bytes) {
  for (size_t i = 0; i < num_bytes; i += kLineBytes) {
    __builtin_prefetch(next + i, /*write=*/0, /*second-level cache*/ 2);
  }
}

// What becomes of a transposed vector: word `word` of kLanes tokens from `token` on.
struct KeepWords {
  float* out;  // [words][64]
  HWY_INLINE void operator()(size_t word, size_t token, FloatVector tokens) const {
    hn::Store(tokens, Floats(), out + word * kPageTokens + token);
  }
};
struct WidenPairs {
  float* out;  // [2 words][64]: each word is two bf16 channels
  HWY_INLINE void operator()(size_t word, size_t token, FloatVector tokens) const {
    const Floats d;
    const Words words;
    const auto bits = hn::BitCast(words, tokens);
    float* to = out + 2 * word * kPageTokens + token;
    hn::Store(hn::BitCast(d, hn::ShiftLeft<16>(bits)), d, to);
    hn::Store(hn::BitCast(d, hn::And(bits, hn::Set(words, 0xffff0000U))), d, to + kPageTokens);
  }
};

// rows [64][row_words], row_words a multiple of 4: store(word, first token, words of kLanes
// tokens).
template <class Store>
HWY_INLINE void transpose_page(const float* HWY_RESTRICT rows,
                               const std::byte* next,
                               size_t row_words,
                               const Store& store) {
  const Floats d;
  const hn::Repartition<double, Floats> pairs;
  const size_t block_bytes = 4 * sizeof(float) * kLanes;
  for (size_t token = 0; token < kPageTokens; token += kLanes) {
    const float* from = rows + token * row_words;
    for (size_t word = 0; word < row_words; word += 4, from += 4, next += block_bytes) {
      prefetch_row(next, block_bytes);
      const FloatVector r0 = load_row_quads(d, from, row_words);
      const FloatVector r1 = load_row_quads(d, from + row_words, row_words);
      const FloatVector r2 = load_row_quads(d, from + 2 * row_words, row_words);
      const FloatVector r3 = load_row_quads(d, from + 3 * row_words, row_words);
      const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(d, r0, r1));
      const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(d, r2, r3));
      const auto high01 = hn::BitCast(pairs, hn::InterleaveUpper(d, r0, r1));
      const auto high23 = hn::BitCast(pairs, hn::InterleaveUpper(d, r2, r3));
      store(word, token, hn::BitCast(d, hn::InterleaveLower(pairs, low01, low23)));
      store(word + 1, token, hn::BitCast(d, hn::InterleaveUpper(pairs, low01, low23)));
      store(word + 2, token, hn::BitCast(d, hn::InterleaveLower(pairs, high01, high23)));
      store(word + 3, token, hn::BitCast(d, hn::InterleaveUpper(pairs, high01, high23)));
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

// data [64][dim] of any type -> out [dim][64] floats; `scratch` [64][dim]. fp16 asks for too much
// of `next`, which is harmless: it is never read.
inline void pack_transposed(DataType dtype,
                            const std::byte* data,
                            const std::byte* next,
                            size_t dim,
                            float* scratch,
                            float* out) {
  const auto* words = reinterpret_cast<const float*>(data);
  switch (dtype) {
    case DataType::kFloat32:
      transpose_page(words, next, dim, KeepWords{out});
      return;
    case DataType::kBFloat16:
      transpose_page(words, next, dim / 2, WidenPairs{out});
      return;
    case DataType::kFloat16:
      with_type(dtype, data, Widen{scratch, kPageTokens * dim});
      transpose_page(scratch, next, dim, KeepWords{out});
      return;
  }
}

struct PackValues {
  const std::byte* next;  // [num_tokens][dim], that are read soon
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
      prefetch_row(next + token * dim * sizeof(T), dim * sizeof(T));
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
                        const std::byte* next,
                        size_t num_tokens,
                        size_t dim,
                        size_t padded_dim,
                        float* out) {
  bool finite = true;
  with_type(dtype, data, PackValues{next, num_tokens, dim, padded_dim, out, &finite});
  return finite;
}

#ifdef LONGSPAN_SIMD_BF16_DOT
// Values of two tokens (of one, when `second` is null) as words; keeps the largest magnitude.
template <class D, class Halves>
HWY_INLINE void pair_channels(
    D words, const uint16_t* first, const uint16_t* second, Halves& largest, uint32_t* out) {
  const hn::Rebind<uint16_t, D> halves;
  const hn::Repartition<uint16_t, D> all_halves;
  auto both = hn::PromoteTo(words, hn::LoadU(halves, first));
  if (second != nullptr) {
    both = hn::Or(both, hn::ShiftLeft<16>(hn::PromoteTo(words, hn::LoadU(halves, second))));
  }
  const auto magnitude = hn::And(hn::BitCast(all_halves, both), hn::Set(all_halves, 0x7fff));
  largest = hn::Max(largest, magnitude);
  hn::StoreU(both, words, out);
}

// bf16 values [num_tokens][dim] -> out [32][padded_dim] words of two successive tokens; returns
// whether all are finite.
inline bool pack_value_pairs(const uint16_t* HWY_RESTRICT data,
                             const std::byte* next,
                             size_t num_tokens,
                             size_t dim,
                             size_t padded_dim,
                             float* HWY_RESTRICT out) {
  const Words words;
  const hn::CappedTag<uint32_t, 8> eight;
  const hn::Repartition<uint16_t, Words> halves;
  const hn::Repartition<uint16_t, decltype(eight)> rest_halves;
  auto largest = hn::Zero(halves);
  auto largest_rest = hn::Zero(rest_halves);
  auto* word_out = reinterpret_cast<uint32_t*>(out);
  const size_t num_pairs = (num_tokens + 1) / 2;
  for (size_t pair = 0; pair < num_pairs; ++pair) {
    const uint16_t* first = data + 2 * pair * dim;
    const uint16_t* second = 2 * pair + 1 < num_tokens ? first + dim : nullptr;
    const size_t step = second == nullptr ? 0 : 1;
    uint32_t* to = word_out + pair * padded_dim;
    prefetch_row(next + 4 * pair * dim, 4 * dim);
    size_t channel = 0;
    for (; channel + kLanes <= dim; channel += kLanes) {
      pair_channels(words, first, second, largest, to + channel);
      first += kLanes;
      second += step * kLanes;
    }
    if (channel < dim) {
      pair_channels(eight, first, second, largest_rest, to + channel);
      hn::StoreU(hn::Zero(eight), eight, to + channel + 8);
    }
  }
  std::memset(word_out + num_pairs * padded_dim, 0, (kPageTokens / 2 - num_pairs) * padded_dim * 4);
  const uint16_t infinity = 0x7f80;
  return hn::AllTrue(halves, hn::Lt(largest, hn::Set(halves, infinity))) &&
         hn::AllTrue(rest_halves, hn::Lt(largest_rest, hn::Set(rest_halves, infinity)));
}
#endif

}  // namespace
}  // namespace longspan::simd
LONGSPAN_AFTER_TARGET();
