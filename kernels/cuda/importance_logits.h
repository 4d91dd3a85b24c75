// Device code of NSA's importance: logits of windows and queries on tensor cores, and their
// exponentials added up over the heads of a token.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/convert.h"
#include "kernels/cuda/importance.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/warp.h"
#include "kernels/page.h"

namespace longspan::cuda::importance {

inline constexpr int kGroupThreads = 128;  // of a warpgroup
inline constexpr int kGroupWarps = 4;
inline constexpr int kStages = kImportanceStages;
inline constexpr int kWindows = kImportanceWindows;
inline constexpr int kColumns = kImportanceColumns;
inline constexpr int kMaxThreads = 4 * kGroupThreads;
static_assert(kWindows == kPageTokens, "a stage is a page");
static_assert(kStages == 3);

// Operands lie in planes of 64 channels: 64 rows of 128 bytes, 16-byte chunks swizzled.
inline constexpr uint32_t kPlaneBytes = 64 * 128;
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(chunk / 8) * kPlaneBytes +
         static_cast<uint32_t>(row * 128 + ((chunk % 8 ^ (row & 7)) << 4));
}

// What the threads of a block know of their place.
struct Place {
  int64_t first_token;
  int kv_head;
  int planes;  // of a row: D / 64
  int num_terms;

  __device__ uint32_t operand_bytes() const { return static_cast<uint32_t>(planes) * kPlaneBytes; }
};

// A page's windows of one KV head, to a stage.
__device__ __forceinline__ void fetch_stage(const std::byte* page,
                                            const Place& place,
                                            uint32_t stage) {
  const int chunks = 8 * place.planes;
  const std::byte* source =
      page + static_cast<size_t>(place.kv_head) * kWindows * static_cast<size_t>(chunks) * 16;
  for (int i = static_cast<int>(threadIdx.x); i < kWindows * chunks;
       i += static_cast<int>(blockDim.x)) {
    ptx::copy_async_16(stage + swizzled(i / chunks, i % chunks), source + i * 16);
  }
}

template <class Q>
__device__ __forceinline__ void load_channels(const void* query, size_t index, float (&values)[8]) {
#pragma unroll
  for (int part = 0; part < 8 / kVectorSize<Q>; ++part) {
    float loaded[kVectorSize<Q>];
    load_vector(static_cast<const Q*>(query) + index + part * kVectorSize<Q>, loaded);
#pragma unroll
    for (int i = 0; i < kVectorSize<Q>; ++i) {
      values[part * kVectorSize<Q> + i] = loaded[i];
    }
  }
}

// The queries of the block's columns as terms: [warpgroup][term][plane], at `queries`. Returns how
// many terms are needed: queries may be numbers of T in a wider type.
template <class T>
__device__ inline int load_queries(const ImportanceArgs& args,
                                   const Place& place,
                                   int columns_per_token,
                                   unsigned char* queries) {
  const ImportanceShape& shape = args.shape;
  const int group = shape.group();
  const int chunks = 8 * place.planes;
  const int num_columns = static_cast<int>(blockDim.x) / kGroupThreads * kColumns;
  const uint32_t operand_bytes = place.operand_bytes();
  int needed = 1;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < num_columns * chunks;
       i += static_cast<int>(blockDim.x)) {
    const int column = i / chunks;
    const int chunk = i % chunks;
    const int64_t token = place.first_token + column / columns_per_token;
    const int head = column % columns_per_token;
    float values[8] = {};
    if (token < shape.num_rows && head < group) {
      const auto index = static_cast<size_t>(
          (token * shape.num_query_heads + place.kv_head * group + head) * shape.dim + chunk * 8);
      if (shape.query_dtype == DataType::kFloat32) {
        load_channels<float>(args.query, index, values);
      } else if (shape.query_dtype == DataType::kFloat16) {
        load_channels<__half>(args.query, index, values);
      } else {
        load_channels<__nv_bfloat16>(args.query, index, values);
      }
    }
    unsigned char* out =
        queries + static_cast<uint32_t>(column / kColumns * place.num_terms) * operand_bytes +
        swizzled(column % kColumns, chunk);
    for (int term = 0; term < place.num_terms; ++term) {
      *reinterpret_cast<uint4*>(out + static_cast<uint32_t>(term) * operand_bytes) = {
          ptx::pack<T>(values[0], values[1]),
          ptx::pack<T>(values[2], values[3]),
          ptx::pack<T>(values[4], values[5]),
          ptx::pack<T>(values[6], values[7])};
#pragma unroll
      for (float& value : values) {
        const float rest = value - to_float(from_float<T>(value));
        needed = value != 0.0F ? max(needed, term + 1) : needed;
        value = fabsf(rest) < __int_as_float(0x7f800000) ? rest : 0.0F;
      }
    }
  }
  const bool third = __syncthreads_or(needed > 2) != 0;
  const bool second = __syncthreads_or(needed > 1) != 0;
  return third ? 3 : second ? 2 : 1;
}

// Logits of a warpgroup: 64 windows, 64 columns, as wgmma_m64k16 has them.
using Logits = float[32];

// Starts the products of a stage of windows with the warpgroup's queries; the small terms first.
template <class T, int kTerms, int kPlanes>
__device__ __forceinline__ void start_logits(uint32_t stage, uint32_t queries, Logits& logits) {
  asm volatile("" : "+r"(queries));  // not all descriptors at hand in registers all the time
  const uint64_t a = ptx::wgmma_descriptor(stage, kPlaneBytes);
  const uint64_t b = ptx::wgmma_descriptor(queries, kPlaneBytes);
  constexpr int kSteps = 4 * kPlanes;
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kTerms * kSteps; ++i) {
    const int term = kTerms - 1 - i / kSteps;
    const int plane = i % kSteps / 4;
    const auto offset = static_cast<uint32_t>(i % 4 * 32);
    ptx::wgmma_m64k16<false>(
        T{},
        logits,
        ptx::wgmma_advance(a, static_cast<uint32_t>(plane) * kPlaneBytes + offset),
        ptx::wgmma_advance(b, static_cast<uint32_t>(term * kPlanes + plane) * kPlaneBytes + offset),
        i > 0);
  }
  ptx::wgmma_commit();
}

// Adds halves of `sums` between lanes: `upper` lanes keep the second half. A single one is added up
// in both.
template <int kCount>
__device__ __forceinline__ void exchange(float (&sums)[kCount][2], int mask, bool upper) {
#pragma unroll
  for (int i = 0; i < (kCount + 1) / 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kCount == 1) {
        sums[0][h] += __shfl_xor_sync(kFullWarp, sums[0][h], mask);
      } else {
        const float low = sums[i][h];
        const float high = sums[i + kCount / 2][h];
        sums[i][h] = (upper ? high : low) + __shfl_xor_sync(kFullWarp, upper ? low : high, mask);
      }
    }
  }
}

// What a lane needs of its columns 8 i + 2 quad_lane + e, i < 8, e < 2.
struct ColumnOffsets {
  float lse[16];   // times log2(e)
  bool all_heads;  // otherwise columns whose lse is +inf count as 0
};

// p of a lane's logits, in their place: of rows lane / 4 + 8 h.
__device__ __forceinline__ void exponentials(float scale_log2,
                                             const ColumnOffsets& columns,
                                             Logits& p) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    p[i] = ptx::approximate_exp2(fmaf(p[i], scale_log2, -columns.lse[i / 4 * 2 + i % 2]));
  }
  if (!columns.all_heads) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      p[i] = columns.lse[i / 4 * 2 + i % 2] < __int_as_float(0x7f800000) ? p[i] : 0.0F;
    }
  }
}

// Adds p over the heads of each token of the warpgroup and writes the sums of the warp's windows.
// `out`: [64 / kPerToken][kImportanceRingStride], at the place of the lane's first window.
template <int kPerToken>
__device__ __forceinline__ void store_sums(const Logits& p, int quad_lane, float* out) {
  static_assert(kPerToken == 4 || kPerToken == 8 || kPerToken == 16);
  constexpr int kTiles = kPerToken == 16 ? 2 : 1;  // of 8 columns, added up in the lane
  constexpr int kSums = 8 / kTiles;
  float sums[kSums][2];
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float* tile = p + 4 * kTiles * i + 2 * h;
      sums[i][h] = tile[0] + tile[1];
      if constexpr (kTiles == 2) {
        sums[i][h] += tile[4] + tile[5];
      }
    }
  }
  int first = 0;  // the lane's tokens: first + i * stride
  int stride = 1;
  constexpr int kLeft = kPerToken == 4 ? kSums / 2 : kSums / 4;
  if constexpr (kPerToken == 4) {
    // A tile has two tokens, two lanes each.
    exchange(sums, 1, (quad_lane & 1) != 0);
    first = (quad_lane & 1) * kSums + quad_lane / 2;
    stride = 2;
  } else {
    exchange(sums, 2, (quad_lane & 2) != 0);
    float(&half)[kSums / 2][2] = reinterpret_cast<float(&)[kSums / 2][2]>(sums);
    exchange(half, 1, (quad_lane & 1) != 0);
    first = (quad_lane & 2) * (kSums / 4) + (quad_lane & 1) * (kSums / 4);
  }
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
    float* of_token = out + (first + i * stride) * kImportanceRingStride;
    of_token[0] = sums[i][0];
    of_token[8] = sums[i][1];
  }
}

}  // namespace longspan::cuda::importance
