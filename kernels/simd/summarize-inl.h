// Pooling of token rows, channel by channel in token order and with the same operations as the
// reference: summaries have the same bits on every backend. (target_*.cc are compiled without
// contraction, which would fuse the plain sums.)
#pragma once

#include "kernels/simd/target.h"
#include "kernels/simd/vector-inl.h"

LONGSPAN_BEFORE_TARGET();
namespace longspan::simd {
namespace {

template <class D, class T>
HWY_INLINE void pool_channels(D d, const PoolRows& pool, const T* rows) {
  auto state = hn::LoadU(d, pool.state);
  auto maxima = pool.pooling == Pooling::kExtremes ? hn::LoadU(d, pool.maxima) : hn::Zero(d);
  for (size_t row = 0; row < pool.num_rows; ++row) {
    const auto element = load_floats(d, rows + row * pool.dim);
    switch (pool.pooling) {
      case Pooling::kSum:
        state = hn::Add(state, element);
        break;
      case Pooling::kWeightedSum:
        state = hn::MulAdd(hn::Set(d, pool.weights[row]), element, state);
        break;
      case Pooling::kExtremes:
        // Only what is strictly beyond replaces, so a NaN stays only when it comes first.
        state = hn::IfThenElse(hn::Lt(element, state), element, state);
        maxima = hn::IfThenElse(hn::Gt(element, maxima), element, maxima);
        break;
    }
  }
  hn::StoreU(state, d, pool.state);
  if (pool.pooling == Pooling::kExtremes) {
    hn::StoreU(maxima, d, pool.maxima);
  }
}

struct PoolTyped {
  const PoolRows* pool;

  template <class T>
  HWY_INLINE void operator()(const T* rows) const {
    PoolRows part = *pool;
    size_t channel = 0;
    for (; channel + kLanes <= pool->dim; channel += kLanes) {
      pool_channels(Floats(), part, rows + channel);
      part.state += kLanes;
      part.maxima += part.maxima == nullptr ? 0 : kLanes;
    }
    if (channel < pool->dim) {
      pool_channels(Eight(), part, rows + channel);
    }
  }
};

inline void pool_rows(const PoolRows& pool) { with_type(pool.dtype, pool.rows, PoolTyped{&pool}); }

}  // namespace
}  // namespace longspan::simd
LONGSPAN_AFTER_TARGET();
