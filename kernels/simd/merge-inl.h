// Sums of partial outputs with a weight each.
#pragma once

#include <cmath>
#include <limits>

#include "kernels/simd/target.h"
#include "kernels/simd/vector-inl.h"

LONGSPAN_BEFORE_TARGET();
namespace longspan::simd {
namespace {

// Parts of a row that are weighed at once; more are done in several passes over the output.
inline constexpr int kPartsAtOnce = 32;

// out[0, dim) (+)= sum of weights[p] * parts[p][0, dim), a zero weight leaving its part unread.
template <class D>
HWY_INLINE void add_parts(D d,
                          const float* const* parts,
                          const float* weights,
                          int num_parts,
                          bool first,
                          size_t channel,
                          float* out) {
  auto sum = first ? hn::Zero(d) : hn::LoadU(d, out + channel);
  for (int part = 0; part < num_parts; ++part) {
    sum = hn::MulAdd(hn::Set(d, weights[part]), hn::LoadU(d, parts[part] + channel), sum);
  }
  hn::StoreU(sum, d, out + channel);
}

inline void add_all_parts(const float* const* parts,
                          const float* weights,
                          int num_parts,
                          bool first,
                          size_t dim,
                          float* out) {
  size_t channel = 0;
  for (; channel + kLanes <= dim; channel += kLanes) {
    add_parts(Floats(), parts, weights, num_parts, first, channel, out);
  }
  const hn::CappedTag<float, 1> one;
  for (; channel < dim; ++channel) {
    add_parts(one, parts, weights, num_parts, first, channel, out);
  }
}

template <class D>
HWY_INLINE void scale_channels(D d, float factor, size_t channel, float* out) {
  hn::StoreU(hn::Mul(hn::LoadU(d, out + channel), hn::Set(d, factor)), d, out + channel);
}

inline void scale_row(float factor, size_t dim, float* out) {
  size_t channel = 0;
  for (; channel + kLanes <= dim; channel += kLanes) {
    scale_channels(Floats(), factor, channel, out);
  }
  const hn::CappedTag<float, 1> one;
  for (; channel < dim; ++channel) {
    scale_channels(one, factor, channel, out);
  }
}

// Parts [first_part, ...) of a row with the weights that are not zero.
struct WeighedParts {
  const float* parts[kPartsAtOnce];
  float weights[kPartsAtOnce];
  int count = 0;

  void add(const MergeParams& params, int part, int64_t row, float weight) {
    if (weight != 0.0F) {  // an empty part's output does not count, whatever it holds
      parts[count] = params.part_out[part] + row * params.value_dim;
      weights[count] = weight;
      ++count;
    }
  }
};

// Weights relative to the largest lse; a NaN lse makes the row NaN.
inline void merge_row_by_lse(const MergeParams& params, int64_t row) {
  const auto dim = static_cast<size_t>(params.value_dim);
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  const float sink = params.sink_logits == nullptr ? minus_infinity : params.sink_logits[row];
  float maximum = sink;
  for (int part = 0; part < params.num_parts; ++part) {
    maximum = std::fmax(maximum, params.part_lse[part][row]);
  }
  const auto weight = [maximum](float lse) {
    return lse == -std::numeric_limits<float>::infinity() ? 0.0F : std::exp(lse - maximum);
  };
  float* out = params.out + row * params.value_dim;
  float total = weight(sink);
  for (int begin = 0; begin == 0 || begin < params.num_parts; begin += kPartsAtOnce) {
    WeighedParts weighed;
    for (int part = begin; part < begin + kPartsAtOnce && part < params.num_parts; ++part) {
      const float part_weight = weight(params.part_lse[part][row]);
      total += part_weight;
      weighed.add(params, part, row, part_weight);
    }
    add_all_parts(weighed.parts, weighed.weights, weighed.count, begin == 0, dim, out);
  }
  scale_row(total == 0.0F ? 0.0F : 1.0F / total, dim, out);
  params.lse[row] = total == 0.0F ? minus_infinity : maximum + std::log(total);
}

inline void merge_row_by_weight(const MergeParams& params, int64_t row) {
  float* out = params.out + row * params.value_dim;
  for (int begin = 0; begin == 0 || begin < params.num_parts; begin += kPartsAtOnce) {
    WeighedParts weighed;
    for (int part = begin; part < begin + kPartsAtOnce && part < params.num_parts; ++part) {
      weighed.add(params, part, row, params.weights[part][row]);
    }
    add_all_parts(weighed.parts,
                  weighed.weights,
                  weighed.count,
                  begin == 0,
                  static_cast<size_t>(params.value_dim),
                  out);
  }
}

inline void merge_rows(const MergeParams& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (params.weights == nullptr) {
      merge_row_by_lse(params, row);
    } else {
      merge_row_by_weight(params, row);
    }
  }
}

}  // namespace
}  // namespace longspan::simd
LONGSPAN_AFTER_TARGET();
