// Device code: attention of one row and head by a block of threads, online softmax in fp32 over
// tiles of its spans. The logits of a tile are made token by token, a few lanes for each; then a
// thread keeps one vector of channels over every few tokens of the tile.
#pragma once

#include "kernels/cuda/convert.h"
#include "kernels/cuda/portable.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda::one_row {

inline constexpr int kAttendThreads = 128;  // of a block
inline constexpr int kTileTokens = 64;

// The part [begin, end) of a list's tokens, counted along the list, that a split takes.
struct Share {
  int64_t begin;
  int64_t end;
};

__device__ inline Share share_of(const Span* spans, int64_t num_spans, int split, int num_splits) {
  if (num_splits == 1) {
    return {0, INT64_MAX};
  }
  int64_t total = 0;
  for (int64_t i = threadIdx.x % kWarpSize; i < num_spans; i += kWarpSize) {
    total += spans[i].end - spans[i].begin;
  }
  total = warp_sum(total);
  return {total * split / num_splits, total * (split + 1) / num_splits};
}

// exp(logit - maximum), 0 for -inf whatever the maximum, NaN for NaN.
__device__ inline float weight_of(float logit, float maximum) {
  return logit == -INFINITY ? 0.0F : expf(logit - maximum);
}

// logits[t] of tokens [token, token + count). `lanes` neighbours share a token.
template <class T>
__device__ void tile_logits(const AttendParams& params,
                            const float* query,  // [D], shared
                            int kv_head,
                            int64_t token,
                            int count,
                            int lanes,
                            float* logits) {  // [kTileTokens], shared
  constexpr int kVector = kVectorSize<T>;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (int first = 0; first < count; first += kAttendThreads / lanes) {
    const int t = first + group;
    float dot = 0.0F;
    if (t < count) {
      const T* key = reinterpret_cast<const T*>(params.kv.key(token + t, kv_head));
      for (int d = lane * kVector; d < params.kv.key_dim; d += lanes * kVector) {
        float elements[kVector];
        load_vector(key + d, elements);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          dot = fmaf(query[d + i], elements[i], dot);
        }
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      dot += __shfl_xor_sync(kFullWarp, dot, offset);
    }
    if (t < count && lane == 0) {
      const float scaled = dot * params.scale;
      logits[t] =
          params.soft_cap > 0.0F ? params.soft_cap * tanhf(scaled / params.soft_cap) : scaled;
    }
  }
}

// What a block keeps of the tiles so far; maximum and total are the same in every thread.
template <class T>
struct State {
  float maximum = -INFINITY;
  float total = 0.0F;
  float sums[kVectorSize<T>] = {};  // of the thread's channels and tokens
};

// Which channels and which tokens of a tile are a thread's in the product with the values.
struct Place {
  int column;  // vector of channels
  int slice;   // tokens slice, slice + num_slices, ...; none where slice >= num_slices
  int num_slices;
};

template <class T>
__device__ Place place_of(int value_dim) {
  const int columns = value_dim / kVectorSize<T>;
  const int thread = static_cast<int>(threadIdx.x);
  return {thread % columns, thread / columns, kAttendThreads / columns};
}

template <class T>
__device__ void accumulate(const AttendParams& params,
                           const Place& place,
                           int kv_head,
                           int64_t token,
                           int count,
                           const float* weights,  // [kTileTokens], shared
                           State<T>& state) {
  constexpr int kVector = kVectorSize<T>;
  if (place.slice >= place.num_slices) {
    return;
  }
  for (int t = place.slice; t < count; t += place.num_slices) {
    float elements[kVector];
    load_vector(
        reinterpret_cast<const T*>(params.kv.value(token + t, kv_head)) + place.column * kVector,
        elements);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      state.sums[i] = fmaf(weights[t], elements[i], state.sums[i]);
    }
  }
}

// Takes a tile's logits into the state; leaves their weights in shared memory.
template <class T>
__device__ void update_softmax(const float* logits, int count, float* weights, State<T>& state) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const float low = lane < count ? logits[lane] : -INFINITY;
  const float high = lane + kWarpSize < count ? logits[lane + kWarpSize] : -INFINITY;
  // fmaxf passes over NaN, which gets its weight of NaN below.
  const float maximum = fmaxf(state.maximum, warp_max(fmaxf(low, high)));
  const float correction = maximum == state.maximum ? 1.0F : expf(state.maximum - maximum);
  const float low_weight = weight_of(low, maximum);
  const float high_weight = weight_of(high, maximum);
  state.total = state.total * correction + warp_sum(low_weight + high_weight);
  state.maximum = maximum;
#pragma unroll
  for (float& sum : state.sums) {
    sum *= correction;
  }
  if (threadIdx.x < kWarpSize) {
    weights[lane] = low_weight;
    weights[lane + kWarpSize] = high_weight;
  }
}

template <class T>
__device__ void write_result(const AttendArgs& args,
                             const Place& place,
                             int64_t out_row,  // t * H + h
                             int split,
                             const State<T>& state,
                             float (*partial)[kVectorSize<T>]) {  // [kAttendThreads], shared
  constexpr int kVector = kVectorSize<T>;
  const AttendParams& params = args.params;
  const int value_dim = params.kv.value_dim;
  const bool is_part = args.num_splits > 1;
  const int64_t part_row = split * params.num_rows * params.num_query_heads + out_row;
  // No token, or none with a weight. A NaN is not that: it makes the total NaN.
  const bool empty = state.total == 0.0F;
  if (threadIdx.x == 0) {
    float* lse = is_part ? args.part_lse + part_row : params.lse + out_row;
    *lse = empty ? -INFINITY : state.maximum + logf(state.total);
  }
  if (params.out == nullptr) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    partial[threadIdx.x][i] = state.sums[i];
  }
  __syncthreads();
  const int columns = value_dim / kVector;
  for (int e = static_cast<int>(threadIdx.x); e < value_dim; e += kAttendThreads) {
    float sum = 0.0F;
    for (int slice = 0; slice < place.num_slices; ++slice) {
      sum += partial[slice * columns + e / kVector][e % kVector];
    }
    const float result = empty ? 0.0F : sum / state.total;
    if (is_part) {
      args.part_out[part_row * value_dim + e] = result;
    } else {
      store_as(params.out_dtype, params.out, static_cast<size_t>(out_row * value_dim + e), result);
    }
  }
}

// Shared memory of a block, beside the query.
template <class T>
struct Scratch {
  float logits[kTileTokens];
  float weights[kTileTokens];
  float partial[kAttendThreads][kVectorSize<T>];
};

// Row and head `out_row` (t * H + h), of its tokens those of `split`. All threads of the block.
template <class T>
__device__ void attend(const AttendArgs& args,
                       int64_t out_row,
                       int split,
                       int lanes,     // of a key
                       float* query,  // [D], shared
                       Scratch<T>& scratch) {
  const AttendParams& params = args.params;
  const int64_t row = out_row / params.num_query_heads;
  const int head = static_cast<int>(out_row % params.num_query_heads);
  const int kv_head = head * params.kv.num_kv_heads / params.num_query_heads;
  const int64_t query_row = params.row_query == nullptr ? row : params.row_query[row];
  for (int d = static_cast<int>(threadIdx.x); d < params.kv.key_dim; d += kAttendThreads) {
    const int64_t element = (query_row * params.num_query_heads + head) * params.kv.key_dim + d;
    query[d] = load_as_float(params.query_dtype, params.query, static_cast<size_t>(element));
  }
  __syncthreads();

  const int64_t list =
      row * params.num_selection_heads + head * params.num_selection_heads / params.num_query_heads;
  const int64_t first_span = params.span_offsets[list];
  const Span* spans = params.spans + first_span;
  const int64_t num_spans = params.span_offsets[list + 1] - first_span;
  const Share share = share_of(spans, num_spans, split, args.num_splits);
  const Place place = params.out == nullptr ? Place{} : place_of<T>(params.kv.value_dim);
  State<T> state;
  int64_t passed = 0;  // tokens of the spans before this one
  for (int64_t i = 0; i < num_spans && passed < share.end; ++i) {
    const Span span = spans[i];
    const int64_t begin = span.begin + max(share.begin - passed, int64_t{0});
    const int64_t end = min(span.end - span.begin, share.end - passed) + span.begin;
    passed += span.end - span.begin;
    for (int64_t token = begin; token < end; token += kTileTokens) {
      const int count = static_cast<int>(min(int64_t{kTileTokens}, end - token));
      tile_logits<T>(params, query, kv_head, token, count, lanes, scratch.logits);
      __syncthreads();
      update_softmax(scratch.logits, count, scratch.weights, state);
      __syncthreads();
      if (params.out != nullptr) {
        accumulate<T>(params, place, kv_head, token, count, scratch.weights, state);
      }
    }
  }
  write_result<T>(args, place, out_row, split, state, scratch.partial);
}

// The power of two, 32 at most, of lanes that share a key: each has a vector, if there are enough.
inline int lanes_of_key(int num_vectors) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes < num_vectors) {
    lanes *= 2;
  }
  return lanes;
}

}  // namespace longspan::cuda::one_row
