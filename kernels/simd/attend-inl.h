// Attention of a tile of query heads to one page: logits, online softmax, weighted values.
#pragma once

#include <cmath>
#include <limits>

#include "kernels/simd/multiply-inl.h"
#include "kernels/simd/pack-inl.h"
#include "kernels/simd/target.h"

LONGSPAN_BEFORE_TARGET();
namespace longspan::simd {
namespace {

#ifdef LONGSPAN_SIMD_BF16_DOT
inline constexpr size_t kMaxPairLanes = 4;
#endif
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

#ifdef LONGSPAN_SIMD_BF16_DOT
// A query as one or two bf16 that add up to it within 2^-16: the first holds its upper bits, the
// second the rest. Queries that were bf16 before have no second.
inline bool split_query(const float* query, size_t dim, uint16_t* upper, uint16_t* rest) {
  bool exact = true;
  for (size_t i = 0; i < dim; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(query[i]);
    const uint32_t upper_bits = bits & 0xffff0000U;
    const float remainder = query[i] - std::bit_cast<float>(upper_bits);
    const bool finite = (bits & 0x7f800000U) != 0x7f800000U;
    upper[i] = finite ? static_cast<uint16_t>(bits >> 16) : float_to_bfloat16(query[i]);
    rest[i] = finite ? float_to_bfloat16(remainder) : uint16_t{0};
    exact = exact && (rest[i] & 0x7fffU) == 0;
  }
  return exact;
}
#endif

// Whether a page is done in pairs: their products take less packing, but on the machines at hand
// (Sapphire Rapids) half as many multiply-adds a cycle as floats, so they are for few lanes.
inline bool uses_pairs(const AttendTile& tile, size_t num_active) {
#ifdef LONGSPAN_SIMD_BF16_DOT
  return tile.dtype == DataType::kBFloat16 && num_active <= kMaxPairLanes;
#else
  static_cast<void>(tile);
  static_cast<void>(num_active);
  return false;
#endif
}

inline void begin_tile(AttendTile& tile) {
  tile.num_query_terms = 1;
  for (size_t lane = 0; lane < tile.num_lanes; ++lane) {
    tile.maximum[lane] = kMinusInfinity;
    tile.sum[lane] = 0.0F;
  }
  if (tile.accumulator != nullptr) {
    std::memset(tile.accumulator, 0, tile.num_lanes * tile.padded_dim * sizeof(float));
  }
#ifdef LONGSPAN_SIMD_BF16_DOT
  const size_t depth = tile.key_dim / 2;
  for (size_t lane = 0; tile.dtype == DataType::kBFloat16 && lane < tile.num_lanes; ++lane) {
    const bool exact = split_query(
        tile.queries[lane],
        tile.key_dim,
        reinterpret_cast<uint16_t*>(tile.query_words + lane * depth),
        reinterpret_cast<uint16_t*>(tile.query_words + (tile.num_lanes + lane) * depth));
    tile.num_query_terms = exact ? tile.num_query_terms : 2;
  }
#endif
}

struct StoreDots {
  float* dots;  // [active][64]
  HWY_INLINE void operator()(size_t row, size_t column, FloatVector sum) const {
    hn::Store(sum, Floats(), dots + row * kPageTokens + column);
  }
};

// Dot products of the active lanes with the page's keys, into tile.weights.
inline void score_lanes(AttendTile& tile, const AttendPage& page) {
  const StoreDots store{tile.weights};
  const float** rows = tile.pointers;
#ifdef LONGSPAN_SIMD_BF16_DOT
  if (uses_pairs(tile, page.num_active)) {
    const size_t depth = tile.key_dim / 2;
    const float** second_rows = rows + tile.num_lanes;
    for (size_t i = 0; i < page.num_active; ++i) {
      const auto lane = static_cast<size_t>(page.lanes[i]);
      rows[i] = tile.query_words + lane * depth;
      second_rows[i] = tile.query_words + (tile.num_lanes + lane) * depth;
    }
    transpose_page(reinterpret_cast<const float*>(page.keys),
                   page.next_keys,
                   depth,
                   KeepWords{tile.packed_keys});
    multiply<PairMath>(Left{{rows, second_rows}, tile.num_query_terms, depth},
                       page.num_active,
                       tile.packed_keys,
                       kPageTokens,
                       store);
    return;
  }
#endif
  for (size_t i = 0; i < page.num_active; ++i) {
    rows[i] = tile.queries[page.lanes[i]];
  }
  pack_transposed(
      tile.dtype, page.keys, page.next_keys, tile.key_dim, tile.widened, tile.packed_keys);
  multiply<FloatMath>(Left{{rows, nullptr}, 1, tile.key_dim},
                      page.num_active,
                      tile.packed_keys,
                      kPageTokens,
                      store);
}

// Dots to logits, -inf where the mask has no bit; returns the largest one.
template <bool kMasked>
HWY_INLINE float mask_logits(const LogitScale& to_logit, uint64_t mask, float* dots) {
  const Floats d;
  uint8_t bits[8];
  std::memcpy(bits, &mask, sizeof(bits));
  FloatVector largest = hn::Set(d, kMinusInfinity);
#pragma GCC unroll 8
  for (size_t i = 0; i < kPageTokens; i += kLanes) {
    FloatVector logit = to_logit(hn::Load(d, dots + i));
    if constexpr (kMasked) {
      logit = hn::IfThenElse(hn::LoadMaskBits(d, bits + i / 8), logit, hn::Set(d, kMinusInfinity));
    }
    largest = hn::Max(logit, largest);  // in this order a NaN logit is passed over
    hn::Store(logit, d, dots + i);
  }
  return hn::GetLane(hn::MaxOfLanes(d, largest));
}

// Logits to weights relative to `maximum`; returns their sum.
HWY_INLINE float exponentiate(float maximum, float* logits) {
  const Floats d;
  const FloatVector origin = hn::Set(d, maximum);
  FloatVector sum = hn::Zero(d);
#pragma GCC unroll 8
  for (size_t i = 0; i < kPageTokens; i += kLanes) {
    const FloatVector weight = exponential(d, hn::Sub(hn::Load(d, logits + i), origin));
    sum = hn::Add(sum, weight);
    hn::Store(weight, d, logits + i);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

// Dots of the active lanes to weights, their maxima and sums brought up to date.
inline void update_softmax(AttendTile& tile, const AttendPage& page) {
  const LogitScale to_logit(tile.scale, tile.soft_cap);
  for (size_t i = 0; i < page.num_active; ++i) {
    const auto lane = static_cast<size_t>(page.lanes[i]);
    float* dots = tile.weights + i * kPageTokens;
    const uint64_t mask = page.masks[i];
    const float largest = mask == ~uint64_t{0} ? mask_logits<false>(to_logit, mask, dots)
                                               : mask_logits<true>(to_logit, mask, dots);
    const float before = tile.maximum[lane];
    const float maximum = largest > before ? largest : before;
    // While nothing has any weight there is no origin; any finite one keeps (-inf) - (-inf) away.
    const float origin = maximum == kMinusInfinity ? 0.0F : maximum;
    const float sum = exponentiate(origin, dots);
    float rescale = 1.0F;
    if (maximum != before) {
      rescale = hn::GetLane(exponential(Floats(), hn::Set(Floats(), before - origin)));
    }
    tile.maximum[lane] = maximum;
    tile.sum[lane] = tile.sum[lane] * rescale + sum;
    tile.rescale[i] = rescale;
  }
}

struct AddToAccumulators {
  const AttendTile* tile;
  const AttendPage* page;
  HWY_INLINE void operator()(size_t row, size_t column, FloatVector sum) const {
    const Floats d;
    float* to =
        tile->accumulator + static_cast<size_t>(page->lanes[row]) * tile->padded_dim + column;
    hn::Store(hn::MulAdd(hn::Load(d, to), hn::Set(d, tile->rescale[row]), sum), d, to);
  }
};

// Where some value is not finite, a lane that does not see all tokens must not even multiply the
// others by zero. Such pages are rare, so this is plain.
inline void add_visible_values(const AttendTile& tile, const AttendPage& page) {
  for (size_t i = 0; i < page.num_active; ++i) {
    float* accumulator = tile.accumulator + static_cast<size_t>(page.lanes[i]) * tile.padded_dim;
    for (size_t channel = 0; channel < tile.value_dim; ++channel) {
      float sum = 0.0F;
      for (size_t token = 0; token < page.num_tokens; ++token) {
        if (((page.masks[i] >> token) & 1U) != 0) {
          sum += tile.weights[i * kPageTokens + token] *
                 load_element(tile.dtype, page.values, token * tile.value_dim + channel);
        }
      }
      accumulator[channel] = accumulator[channel] * tile.rescale[i] + sum;
    }
  }
}

#ifdef LONGSPAN_SIMD_BF16_DOT
// Weights [active][64] to bf16 pairs [active][32].
inline void round_weights(const AttendTile& tile, size_t num_active) {
  for (size_t i = 0; i < num_active * kPageTokens; i += 2 * kLanes) {
    const __m512 low = _mm512_load_ps(tile.weights + i);
    const __m512 high = _mm512_load_ps(tile.weights + i + kLanes);
    _mm512_store_si512(tile.weight_words + i / 2,
                       reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
}
#endif

inline void add_values(AttendTile& tile, const AttendPage& page) {
  const AddToAccumulators store{&tile, &page};
  const float** rows = tile.pointers;
#ifdef LONGSPAN_SIMD_BF16_DOT
  if (uses_pairs(tile, page.num_active)) {
    const auto* values = reinterpret_cast<const uint16_t*>(page.values);
    if (!pack_value_pairs(values,
                          page.next_values,
                          page.num_tokens,
                          tile.value_dim,
                          tile.padded_dim,
                          tile.packed_values)) {
      add_visible_values(tile, page);
      return;
    }
    round_weights(tile, page.num_active);
    for (size_t i = 0; i < page.num_active; ++i) {
      rows[i] = tile.weight_words + i * kPageTokens / 2;
    }
    multiply<PairMath>(Left{{rows, nullptr}, 1, kPageTokens / 2},
                       page.num_active,
                       tile.packed_values,
                       tile.padded_dim,
                       store);
    return;
  }
#endif
  if (!pack_values(tile.dtype,
                   page.values,
                   page.next_values,
                   page.num_tokens,
                   tile.value_dim,
                   tile.padded_dim,
                   tile.packed_values)) {
    add_visible_values(tile, page);
    return;
  }
  for (size_t i = 0; i < page.num_active; ++i) {
    rows[i] = tile.weights + i * kPageTokens;
  }
  multiply<FloatMath>(Left{{rows, nullptr}, 1, kPageTokens},
                      page.num_active,
                      tile.packed_values,
                      tile.padded_dim,
                      store);
}

inline void attend_page(AttendTile& tile, const AttendPage& page) {
  score_lanes(tile, page);
  update_softmax(tile, page);
  if (tile.accumulator != nullptr) {
    add_values(tile, page);
  }
}

}  // namespace
}  // namespace longspan::simd
LONGSPAN_AFTER_TARGET();
