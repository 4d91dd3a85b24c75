// The one product that scoring and attending are made of:
//   out[row][column] = sum over k of left[row][k] * right[k][column],
// with left rows anywhere in memory and a block of the result in registers.
#pragma once

#include "kernels/simd/vector-inl.h"

LONGSPAN_BEFORE_TARGET();
namespace longspan::simd {
namespace {

// One multiply-add of words: what a target has for floats, and for pairs of bf16.
struct FloatMath {
  static HWY_INLINE FloatVector multiply_add(FloatVector left, FloatVector right, FloatVector sum) {
    return hn::MulAdd(left, right, sum);
  }
};
#ifdef LONGSPAN_SIMD_BF16_DOT
struct PairMath {
  static HWY_INLINE FloatVector multiply_add(FloatVector left, FloatVector right, FloatVector sum) {
    return FloatVector{_mm512_dpbf16_ps(
        sum.raw, reinterpret_cast<__m512bh>(left.raw), reinterpret_cast<__m512bh>(right.raw))};
  }
};
#endif

// Rows and vectors of a register block: 24 accumulators of 32 registers, or 12 of 16.
inline constexpr size_t kBlockRows = 6;
inline constexpr size_t kBlockVectors = kLanes == 16 ? 4 : 2;

// Left sides of up to kBlockRows rows; the sum runs over all terms.
struct Left {
  const float* const* rows[2];  // rows[term][row] -> [depth] words
  size_t num_terms;
  size_t depth;
};

template <class Math, size_t kRows, size_t kVectors, class Store>
HWY_INLINE void multiply_block(const Left& left,
                               size_t first_row,
                               const float* HWY_RESTRICT right,
                               size_t right_stride,
                               size_t column,
                               const Store& store) {
  const Floats d;
  FloatVector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (size_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      sum[row][v] = hn::Zero(d);
    }
  }
  for (size_t term = 0; term < left.num_terms; ++term) {
    const float* rows[kRows];
#pragma GCC unroll 8
    for (size_t row = 0; row < kRows; ++row) {
      rows[row] = left.rows[term][first_row + row];
    }
    const float* from = right + column;
    for (size_t k = 0; k < left.depth; ++k, from += right_stride) {
      FloatVector words[kVectors];
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) {
        words[v] = hn::Load(d, from + v * kLanes);
      }
#pragma GCC unroll 8
      for (size_t row = 0; row < kRows; ++row) {
        const FloatVector word = hn::Set(d, rows[row][k]);
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) {
          sum[row][v] = Math::multiply_add(word, words[v], sum[row][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (size_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      store(first_row + row, column + v * kLanes, sum[row][v]);
    }
  }
}

template <class Math, size_t kRows, class Store>
HWY_INLINE void multiply_rows(const Left& left,
                              size_t first_row,
                              const float* right,
                              size_t num_columns,
                              const Store& store) {
  size_t column = 0;
  for (; column + kBlockVectors * kLanes <= num_columns; column += kBlockVectors * kLanes) {
    multiply_block<Math, kRows, kBlockVectors>(left, first_row, right, num_columns, column, store);
  }
  for (; column < num_columns; column += kLanes) {
    multiply_block<Math, kRows, 1>(left, first_row, right, num_columns, column, store);
  }
}

// right [depth][num_columns], num_columns a multiple of 16; store(row, column, vector) takes each
// part of the result once.
template <class Math, class Store>
HWY_INLINE void multiply(
    const Left& left, size_t num_rows, const float* right, size_t num_columns, const Store& store) {
  size_t row = 0;
  for (; row + kBlockRows <= num_rows; row += kBlockRows) {
    multiply_rows<Math, kBlockRows>(left, row, right, num_columns, store);
  }
  switch (num_rows - row) {
    case 5:
      multiply_rows<Math, 5>(left, row, right, num_columns, store);
      return;
    case 4:
      multiply_rows<Math, 4>(left, row, right, num_columns, store);
      return;
    case 3:
      multiply_rows<Math, 3>(left, row, right, num_columns, store);
      return;
    case 2:
      multiply_rows<Math, 2>(left, row, right, num_columns, store);
      return;
    case 1:
      multiply_rows<Math, 1>(left, row, right, num_columns, store);
      return;
    default:
      return;
  }
}

}  // namespace
}  // namespace longspan::simd
LONGSPAN_AFTER_TARGET();
