// Device code of the fused search: the vectors that summaries are scored with, and scores one by
// one, head by head.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/convert.h"
#include "kernels/cuda/search_topk.h"
#include "kernels/page.h"

namespace longspan::cuda {

__device__ __forceinline__ float query_element(const SearchTopkArgs& args,
                                               int64_t row,
                                               int head,
                                               int channel) {
  const int64_t index = (row * args.shape.num_query_heads + head) * args.shape.dim + channel;
  return load_as_float(args.shape.query_dtype, args.query, static_cast<size_t>(index));
}

// Two elements of 16 bits as floats.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(&pair, &word, sizeof(pair));
    return __half22float2(pair);
  } else {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000U));
  }
}

// The part of a query that meets a plane of a summary. Of a bound these are the minima (0), which
// matter where the query is negative, and the maxima (1); a NaN belongs to both.
__device__ __forceinline__ float plane_part(ScoreForm score, int plane, float query) {
  if (score == ScoreForm::kDot) {
    return query;
  }
  return (plane == 0 ? query > 0.0F : query < 0.0F) ? 0.0F : query;
}

// The heads that are added up in a vector: first, and how many.
struct VectorHeads {
  int first;
  int count;
};

__device__ __forceinline__ VectorHeads vector_heads(const SearchShape& shape,
                                                    int kv_head,
                                                    int vector) {
  const int group = shape.group();
  switch (shape.query_form) {
    case QueryForm::kEachHead:
      return {kv_head * group + vector, 1};
    case QueryForm::kAllMean:
      return {0, shape.num_query_heads};
    case QueryForm::kGroupSum:
    case QueryForm::kGroupMean:
      break;
  }
  return {kv_head * group, group};
}

// A channel of a vector. Sums of heads take each head's part; means are taken before.
__device__ inline float vector_element(
    const SearchTopkArgs& args, int64_t row, int kv_head, int vector, int plane, int channel) {
  const SearchShape& shape = args.shape;
  const VectorHeads heads = vector_heads(shape, kv_head, vector);
  const bool mean =
      shape.query_form == QueryForm::kGroupMean || shape.query_form == QueryForm::kAllMean;
  float sum = 0.0F;
  for (int head = heads.first; head < heads.first + heads.count; ++head) {
    const float element = query_element(args, row, head, channel);
    sum += mean ? element : plane_part(shape.score, plane, element);
  }
  return mean ? plane_part(shape.score, plane, sum / static_cast<float>(heads.count)) : sum;
}

__device__ __forceinline__ float nan_to_lowest(float score) {
  return score != score ? -__int_as_float(0x7f800000) : score;
}

__device__ __forceinline__ bool is_finite(float score) {
  return fabsf(score) < __int_as_float(0x7f800000);
}

// The score of one entry for a vector, as kernels/params.h has it for keys and queries that are not
// finite: a NaN counts as -inf in each head before heads are added up. Vectors that were summed,
// split into terms or parted by sign give such scores differently, but never a finite one instead;
// so whoever finds a score that is not finite asks here. Slow, and rare.
__device__ __noinline__ inline float exact_score(
    const SearchTopkArgs& args, int64_t row, int kv_head, int vector, int64_t entry) {
  const SearchShape& shape = args.shape;
  const size_t plane_elements =
      static_cast<size_t>(shape.num_kv_heads) * kPageTokens * static_cast<size_t>(shape.dim);
  const size_t first =
      (static_cast<size_t>(kv_head) * kPageTokens + static_cast<size_t>(entry % kPageTokens)) *
      static_cast<size_t>(shape.dim);
  const std::byte* page = args.pages[entry / kPageTokens];
  const VectorHeads heads = vector_heads(shape, kv_head, vector);
  const bool summed = shape.query_form == QueryForm::kGroupSum;
  float total = 0.0F;
  for (int head = 0; head < (summed ? heads.count : 1); ++head) {
    float score = 0.0F;
    for (int channel = 0; channel < shape.dim; ++channel) {
      float query = 0.0F;
      if (summed || heads.count == 1) {
        query = query_element(args, row, heads.first + head, channel);
      } else {
        for (int i = 0; i < heads.count; ++i) {
          query += query_element(args, row, heads.first + i, channel);
        }
        query /= static_cast<float>(heads.count);
      }
      const size_t element = first + static_cast<size_t>(channel);
      const float low = query * load_as_float(shape.dtype, page, element);
      if (shape.score == ScoreForm::kBound) {
        const float high = query * load_as_float(shape.dtype, page, plane_elements + element);
        score += low != low || high != high ? low + high : fmaxf(low, high);
      } else {
        score += low;
      }
    }
    total += nan_to_lowest(score);
  }
  return nan_to_lowest(total);
}

// The same for a list of a set of KV heads: joined, before it is divided.
__device__ __noinline__ inline float exact_list_score(
    const SearchTopkArgs& args, int64_t row, int set, int list, int64_t entry) {
  const SearchShape& shape = args.shape;
  const int kv_heads = shape.kv_heads_per_set();
  if (shape.join == ScoreJoin::kNone) {
    return exact_score(args, row, set, list, entry);
  }
  const bool maximum = shape.join == ScoreJoin::kMax;
  float joined = maximum ? -__int_as_float(0x7f800000) : 0.0F;
  for (int i = 0; i < kv_heads; ++i) {
    for (int vector = 0; vector < shape.vectors(); ++vector) {
      const float score = exact_score(args, row, set * kv_heads + i, vector, entry);
      joined = maximum ? fmaxf(joined, score) : joined + score;
    }
  }
  return nan_to_lowest(joined);
}

}  // namespace longspan::cuda
