// Device code of split-KV decode: what one warp does with 16 tokens in shared memory.
//
// With tokens as the rows of the tensor core's tiles and heads as the columns, no more than 8
// columns are there for a group of 4. Each warp has a softmax of its own; decode_join.h joins them.
#pragma once

#include <cstdint>

#include "kernels/cuda/decode_shape.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda::decode {

// A warp's part of an item, over the slices that it has seen. Element j of a fragment: channel
// 16 * tile + lane / 4 + 8 * (j / 2), head 8 * head tile + 2 * (lane % 4) + j % 2.
template <class S>
struct Accumulator {
  float out[S::kChannelTiles][S::kHeadTiles][4];
  float maximum[S::kHeadTiles][2];  // of logits in base 2; the same in all lanes of a head
  float base[S::kHeadTiles][2];     // maximum, or 0 where that is -inf
  float sum[S::kHeadTiles][2];      // over this lane's tokens

  __device__ Accumulator() {
#pragma unroll
    for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        maximum[n][c] = -kInfinity;
        base[n][c] = 0.0F;
        sum[n][c] = 0.0F;
      }
#pragma unroll
      for (int t = 0; t < S::kChannelTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          out[t][n][j] = 0.0F;
        }
      }
    }
  }
};

// What a warp keeps of its place: addresses of its rows of a stage for ldmatrix, without the
// stage's own.
struct ConsumerView {
  int lane;
  int warp;        // of the set, and slice of a stage
  uint32_t key;    // offset of this lane's row and 16-byte chunk in a tile of keys
  uint32_t value;  // in a tile of values
  uint32_t query;  // shared address of this lane's first fragment of the queries

  __device__ ConsumerView(int lane, int warp, uint32_t query_address)
      : lane(lane), warp(warp), query(query_address + lane * 8) {
    // ldmatrix gives matrix lane / 8 its row lane % 8. A fragment of keys has tokens 0 to 7, then 8
    // to 15, of one chunk, then of the next; one of values, read transposed, two chunks of tokens 0
    // to 7, then of 8 to 15. The swizzle exchanges the chunks of a row by its number.
    const int matrix = lane / 8;
    const int matrix_row = lane % 8;
    const int key_row = warp * kSliceTokens + matrix % 2 * 8 + matrix_row;
    const int value_row = warp * kSliceTokens + matrix / 2 * 8 + matrix_row;
    key = key_row * kPlaneRowBytes + ((matrix / 2) ^ matrix_row) * 16;
    value = value_row * kPlaneRowBytes + ((matrix % 2) ^ matrix_row) * 16;
  }
};

// The address of 16 columns further on, `step` times: the chunks of a row are exchanged within
// their plane.
__device__ __forceinline__ uint32_t column_step(uint32_t tile, uint32_t offset, int step) {
  return tile + (offset ^ (step % 4 * 32)) + step / 4 * kPlaneBytes;
}

// Fragments of a set's queries, in bytes: [terms][kHeadTiles][kKeySteps][32 lanes][2 registers].
template <class S>
constexpr int query_bytes(int query_terms) {
  return query_terms * S::kHeadTiles * S::kKeySteps * kWarpSize * 8;
}

// Products of 16 keys and one term of the set's queries: [token lane / 4 (+ 8)][head
// 2 * (lane % 4) (+ 1)].
template <class S>
__device__ __forceinline__ void multiply_keys(const ConsumerView& view,
                                              uint32_t key_tile,
                                              int term,
                                              float (&products)[S::kHeadTiles][4]) {
  const uint32_t query = view.query + term * query_bytes<S>(1);
  // Two sums for each tile, since each waits for its last instruction.
  float sums[S::kHeadTiles][2][4] = {};
#pragma unroll
  for (int step = 0; step < S::kKeySteps; ++step) {
    uint32_t keys[4];
    ptx::load_matrix_x4(keys, column_step(key_tile, view.key, step));
#pragma unroll
    for (int n = 0; n < S::kHeadTiles; ++n) {
      uint32_t queries[2];
      ptx::load_shared_x2(queries, query + (n * S::kKeySteps + step) * kWarpSize * 8);
      ptx::mma_m16n8k16<typename S::Element>(sums[n][step % 2], keys, queries[0], queries[1]);
    }
  }
#pragma unroll
  for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      products[n][j] = sums[n][0][j] + sums[n][1][j];
    }
  }
}

// The rest of fp32 queries, which their first term left over.
template <class S>
__device__ __forceinline__ void add_second_term(const ConsumerView& view,
                                                uint32_t key_tile,
                                                float (&products)[S::kHeadTiles][4]) {
  float rest[S::kHeadTiles][4];
  multiply_keys<S>(view, key_tile, 1, rest);
#pragma unroll
  for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // the rest does not know the sign of an infinity
      products[n][j] = isfinite(products[n][j]) ? products[n][j] + rest[n][j] : products[n][j];
    }
  }
}

// Products to logits in base 2; those outside tokens [first, last] to -inf. With a soft cap:
// tanh(y) = 1 - 2 / (e^2y + 1), where the scale makes e^2y a power of 2.
template <class S>
__device__ __forceinline__ void scale_logits(
    const Softmax& softmax, int lane, int first, int last, float (&logits)[S::kHeadTiles][4]) {
#pragma unroll
  for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      logits[n][j] *= softmax.scale;
    }
  }
  if (softmax.soft_cap != 0.0F) {
#pragma unroll
    for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float power = ptx::approximate_exp2(logits[n][j]);
        logits[n][j] = softmax.soft_cap * (1.0F - __fdividef(2.0F, power + 1.0F));
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int token = lane / 4 + j / 2 * 8;
    const bool in_range = token >= first && token <= last;
#pragma unroll
    for (int n = 0; n < S::kHeadTiles; ++n) {
      logits[n][j] = in_range ? logits[n][j] : -kInfinity;
    }
  }
}

// Raises the maxima to those of a slice's logits and rescales what has been summed, if any head
// of the warp has a new one.
template <class S>
__device__ __forceinline__ void raise_maximum(Accumulator<S>& sums,
                                              const float (&logits)[S::kHeadTiles][4]) {
  float maximum[S::kHeadTiles][2];
  bool raised = false;
#pragma unroll
  for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float value = fmaxf(logits[n][c], logits[n][c + 2]);
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
      }
      raised = raised || value > sums.maximum[n][c];
      maximum[n][c] = fmaxf(value, sums.maximum[n][c]);
    }
  }
  if (!__any_sync(kFullWarp, raised)) {
    return;
  }
#pragma unroll
  for (int n = 0; n < S::kHeadTiles; ++n) {
    float factor[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      sums.base[n][c] = maximum[n][c] == -kInfinity ? 0.0F : maximum[n][c];
      factor[c] = ptx::approximate_exp2(sums.maximum[n][c] - sums.base[n][c]);
      sums.maximum[n][c] = maximum[n][c];
      sums.sum[n][c] *= factor[c];
    }
#pragma unroll
    for (int t = 0; t < S::kChannelTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums.out[t][n][j] *= factor[j % 2];
      }
    }
  }
}

// Writes zeros over the slice's values outside tokens [first, last]: their weights are zero, but
// zero times what may lie there is not.
template <class S>
__device__ void clear_values(const ConsumerView& view, std::byte* value_tile, int first, int last) {
  constexpr int kChunks = kPlaneRowBytes / 16;
  for (int i = view.lane; i < S::kValuePlanes * kSliceTokens * kChunks; i += kWarpSize) {
    const int token = i / kChunks % kSliceTokens;
    const int plane = i / kChunks / kSliceTokens;
    if (token < first || token > last) {
      std::byte* row =
          value_tile + plane * kPlaneBytes + (view.warp * kSliceTokens + token) * kPlaneRowBytes;
      reinterpret_cast<uint4*>(row)[i % kChunks] = uint4{0, 0, 0, 0};
    }
  }
  ptx::fence_async_shared();
  __syncwarp();
}

// Adds tokens [first, last] of the warp's slice of a stage.
template <class S>
__device__ __forceinline__ void attend_slice(const Softmax& softmax,
                                             const ConsumerView& view,
                                             std::byte* stage,
                                             int first,
                                             int last,
                                             Accumulator<S>& sums) {
  using T = typename S::Element;
  const uint32_t key_tile = ptx::shared_address(stage);
  const uint32_t value_tile = key_tile + S::kKeyTileBytes;
  if (last - first != kSliceTokens - 1) {
    clear_values<S>(view, stage + S::kKeyTileBytes, first, last);
  }
  float logits[S::kHeadTiles][4];
  multiply_keys<S>(view, key_tile, 0, logits);
  if (softmax.query_terms == 2) {
    add_second_term<S>(view, key_tile, logits);
  }
  scale_logits<S>(softmax, view.lane, first, last, logits);
  raise_maximum(sums, logits);
  uint32_t weights[S::kHeadTiles][2];  // fragments of tokens 0 to 7 and 8 to 15, heads as columns
#pragma unroll
  for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      logits[n][j] = ptx::approximate_exp2(logits[n][j] - sums.base[n][j % 2]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums.sum[n][i] += logits[n][i] + logits[n][i + 2];
      weights[n][i] = ptx::transpose_matrix(ptx::pack<T>(logits[n][2 * i], logits[n][2 * i + 1]));
    }
  }
#pragma unroll
  for (int t = 0; t < S::kChannelTiles; ++t) {
    uint32_t values[4];
    ptx::load_matrix_x4_trans(values, column_step(value_tile, view.value, t));
#pragma unroll
    for (int n = 0; n < S::kHeadTiles; ++n) {
      ptx::mma_m16n8k16<T>(sums.out[t][n], values, weights[n][0], weights[n][1]);
    }
  }
}

// Eight elements of a query, as registers of fragments: four pairs for each term.
struct QueryVector {
  uint32_t terms[2][4];
};

// The elements at `index`, a multiple of 8. Of an fp32 query term 1 is what term 0 leaves over.
template <typename T>
__device__ __forceinline__ QueryVector load_query_vector(const AttendParams& params,
                                                         int64_t index) {
  QueryVector vector = {};
  if (params.query_dtype != DataType::kFloat32) {
    const uint4 bits =
        *reinterpret_cast<const uint4*>(reinterpret_cast<const T*>(params.query) + index);
    vector.terms[0][0] = bits.x;
    vector.terms[0][1] = bits.y;
    vector.terms[0][2] = bits.z;
    vector.terms[0][3] = bits.w;
    return vector;
  }
  const auto* quads = reinterpret_cast<const float4*>(params.query + index);
  const float4 low = quads[0];
  const float4 high = quads[1];
  const float elements[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  float rest[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float rounded = to_float(from_float<T>(elements[i]));
    rest[i] = isfinite(rounded) ? elements[i] - rounded : 0.0F;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    vector.terms[0][i] = ptx::pack<T>(elements[2 * i], elements[2 * i + 1]);
    vector.terms[1][i] = ptx::pack<T>(rest[2 * i], rest[2 * i + 1]);
  }
  return vector;
}

// A row's queries of heads [first_head, first_head + num_heads) as fragments in shared memory, by
// kThreads threads; heads of the set beyond those are zero. The threads are to be synchronised
// after it.
template <class S, int kThreads>
__device__ __forceinline__ void load_queries(const AttendParams& params,
                                             int query_terms,
                                             int64_t row,
                                             int first_head,
                                             int num_heads,
                                             uint32_t* fragments,
                                             int thread) {
  constexpr int kRowVectors = S::kKeyDim / 8;
  constexpr int kVectors = S::kHeads * kRowVectors;
  constexpr int kRounds = (kVectors + kThreads - 1) / kThreads;
  const int64_t query = params.row_query == nullptr ? row : params.row_query[row];
  const int64_t first_index = (query * params.num_query_heads + first_head) * S::kKeyDim;
  QueryVector vectors[kRounds];  // all of them under way before the first is kept
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int vector = thread + i * kThreads;
    vectors[i] = vector / kRowVectors < num_heads
                     ? load_query_vector<typename S::Element>(params, first_index + vector * 8)
                     : QueryVector{};
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int vector = thread + i * kThreads;
    const int head = vector / kRowVectors;
    const int step = vector % kRowVectors / 2;
    const int half = vector % 2;  // of the 16 columns of a step: which of a lane's two registers
    uint32_t* const fragment =
        fragments + (head / 8 * S::kKeySteps + step) * kWarpSize * 2 + head % 8 * 8 + half;
#pragma unroll
    for (int term = 0; term < 2; ++term) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        if (term < query_terms && vector < kVectors) {
          fragment[term * query_bytes<S>(1) / 4 + pair * 2] = vectors[i].terms[term][pair];
        }
      }
    }
  }
}

}  // namespace longspan::cuda::decode
