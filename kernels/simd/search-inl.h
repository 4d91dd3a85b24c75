// Scores of entries and anchors, in fp32 from exactly widened keys and unrounded queries: what is
// selected must not depend on the target.
#pragma once

#include <cmath>

#include "kernels/simd/multiply-inl.h"
#include "kernels/simd/pack-inl.h"
#include "kernels/simd/target.h"

LONGSPAN_BEFORE_TARGET();
namespace longspan::simd {
namespace {

struct StoreProducts {
  float* products;  // [rows][64]
  HWY_INLINE void operator()(size_t row, size_t column, FloatVector sum) const {
    hn::Store(sum, Floats(), products + row * kPageTokens + column);
  }
};

HWY_INLINE bool all_finite(const float* data, size_t count) {
  const Floats d;
  FloatVector check = hn::Zero(d);
  for (size_t i = 0; i < count; i += kLanes) {
    check = hn::MulAdd(hn::Load(d, data + i), hn::Zero(d), check);
  }
  return hn::AllFalse(d, hn::IsNaN(check));
}

// Bounds where some minimum or maximum is not finite: 0 * inf must not turn an honest bound into
// NaN, so the larger product is chosen as the formula says. Packed [2 D][64].
inline void bound_products(const ScoreTile& tile, const ScorePage& page) {
  for (size_t row = 0; row < page.num_rows * tile.num_heads; ++row) {
    for (size_t entry = 0; entry < kPageTokens; ++entry) {
      float sum = 0.0F;
      for (size_t channel = 0; channel < tile.key_dim; ++channel) {
        const float q = page.queries[row][channel] + page.queries[row][tile.key_dim + channel];
        const float low = q * tile.packed[channel * kPageTokens + entry];
        const float high = q * tile.packed[(tile.key_dim + channel) * kPageTokens + entry];
        sum += std::isnan(low) || std::isnan(high) ? low + high : (low > high ? low : high);
      }
      tile.products[row * kPageTokens + entry] = sum;
    }
  }
}

// exp(logit - lse) of one head's 64 products.
HWY_INLINE void to_probabilities(const LogitScale& to_logit, float lse, float* products) {
  const Floats d;
  for (size_t i = 0; i < kPageTokens; i += kLanes) {
    const FloatVector logit = to_logit(hn::Load(d, products + i));
    hn::Store(exponential(d, hn::Sub(logit, hn::Set(d, lse))), d, products + i);
  }
}

HWY_INLINE void join_head(HeadJoin join, const float* products, float* scores) {
  const Floats d;
  for (size_t i = 0; i < kPageTokens; i += kLanes) {
    const FloatVector product = hn::Load(d, products + i);
    const FloatVector before = hn::Load(d, scores + i);
    // Max in this order passes over a NaN product; in a sum NaN stays, and counts as -inf later.
    hn::Store(join == HeadJoin::kMax ? hn::Max(product, before) : hn::Add(before, product),
              d,
              scores + i);
  }
}

inline void score_page(const ScoreTile& tile, const ScorePage& page) {
  pack_transposed(tile.dtype, page.keys, page.next_keys, tile.key_dim, tile.widened, tile.packed);
  size_t depth = tile.key_dim;
  const size_t num_lanes = page.num_rows * tile.num_heads;
  if (tile.bound) {
    // sum of max(q m, q M) = (negative part of q) m + (positive part of q) M: one product.
    pack_transposed(tile.dtype,
                    page.values,
                    page.next_values,
                    tile.key_dim,
                    tile.widened,
                    tile.packed + tile.key_dim * kPageTokens);
    depth *= 2;
  }
  if (tile.bound && !all_finite(tile.packed, depth * kPageTokens)) {
    bound_products(tile, page);
  } else {
    multiply<FloatMath>(Left{{page.queries, nullptr}, 1, depth},
                        num_lanes,
                        tile.packed,
                        kPageTokens,
                        StoreProducts{tile.products});
  }
  const LogitScale to_logit(tile.scale, tile.soft_cap);
  for (size_t row = 0; row < page.num_rows; ++row) {
    for (size_t head = 0; head < tile.num_heads; ++head) {
      float* products = tile.products + (row * tile.num_heads + head) * kPageTokens;
      if (tile.softmax) {
        to_probabilities(to_logit, page.lse[row][head], products);
      }
      if (tile.join == HeadJoin::kNone) {
        std::memcpy(page.scores[row] + head * kPageTokens, products, kPageTokens * sizeof(float));
      } else {
        join_head(tile.join, products, page.scores[row]);
      }
    }
  }
}

inline uint64_t above(const float* scores, float threshold) {
  const Floats d;
  const FloatVector limit = hn::Set(d, threshold);
  uint8_t bits[8] = {};
  for (size_t i = 0; i < kPageTokens; i += kLanes) {
    hn::StoreMaskBits(d, hn::Gt(hn::LoadU(d, scores + i), limit), bits + i / 8);
  }
  uint64_t mask = 0;
  std::memcpy(&mask, bits, sizeof(mask));
  return mask;
}

template <class T>
HWY_INLINE float dot_row(const float* query, const T* key, size_t dim) {
  const Floats d;
  const Eight eight;
  FloatVector sum = hn::Zero(d);
  size_t channel = 0;
  for (; channel + kLanes <= dim; channel += kLanes) {
    sum = hn::MulAdd(hn::LoadU(d, query + channel), load_floats(d, key + channel), sum);
  }
  float result = hn::GetLane(hn::SumOfLanes(d, sum));
  if (channel < dim) {
    const auto rest = hn::Mul(hn::LoadU(eight, query + channel), load_floats(eight, key + channel));
    result += hn::GetLane(hn::SumOfLanes(eight, rest));
  }
  return result;
}

struct ScoreKey {
  const AnchorScores* anchors;
  size_t index;

  template <class T>
  HWY_INLINE void operator()(const T* key) const {
    const auto dim = static_cast<size_t>(anchors->view->key_dim);
    for (size_t head = 0; head < anchors->num_heads; ++head) {
      anchors->scores[head * anchors->num_tokens + index] =
          dot_row(anchors->queries + head * dim, key, dim);
    }
  }
};

inline void score_anchors(const AnchorScores& anchors) {
  for (size_t i = 0; i < anchors.num_tokens; ++i) {
    with_type(anchors.view->dtype,
              anchors.view->key(anchors.tokens[i], anchors.kv_head),
              ScoreKey{&anchors, i});
  }
}

}  // namespace
}  // namespace longspan::simd
LONGSPAN_AFTER_TARGET();
