// What the kernels of split-KV decode are instantiated for, and the small things that they share.
#pragma once

#include <cstdint>

#include "kernels/cuda/convert.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/ptx.h"
#include "kernels/params.h"

namespace longspan::cuda::decode {

inline constexpr int kSetWarps = 4;         // of a set, one for each slice of a page
inline constexpr int kPlaneRowBytes = 128;  // a row of 64 elements, the width of the swizzle
inline constexpr int kPlaneBytes = kPageTokens * kPlaneRowBytes;
inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;
inline constexpr float kInfinity = __builtin_huge_valf();

// kKeyDim, kValueDim: multiples of 64. kHeadTiles: columns of 8 query heads that a warp works on.
// kSets: sets of consumer warps.
template <typename T, int kKeyDimension, int kValueDimension, int kNumHeadTiles, int kNumSets>
struct Shape {
  using Element = T;
  static constexpr int kSets = kNumSets;
  static constexpr int kKeyDim = kKeyDimension;
  static constexpr int kValueDim = kValueDimension;
  static constexpr int kHeadTiles = kNumHeadTiles;
  static constexpr int kHeads = 8 * kHeadTiles;  // of a set
  static constexpr int kKeyPlanes = kKeyDim / 64;
  static constexpr int kValuePlanes = kValueDim / 64;
  static constexpr int kKeyTileBytes = kKeyPlanes * kPlaneBytes;
  static constexpr int kStageBytes = kKeyTileBytes + kValuePlanes * kPlaneBytes;
  static constexpr int kSliceBytes = kStageBytes / kSlicesPerPage;
  static constexpr int kKeySteps = kKeyDim / 16;
  static constexpr int kChannelTiles = kValueDim / 16;
  // Fragments of a warp's output, 16 channels of 8 heads each.
  static constexpr int kFragments = kChannelTiles * kHeadTiles;
};

// How products become logits in base 2.
struct Softmax {
  int query_terms = 1;    // 2: fp32 queries, as the sum of two of the cache's type
  float scale = 1.0F;     // to base 2; with a soft cap see scale_logits
  float soft_cap = 0.0F;  // in base 2; 0: none

  Softmax() = default;
  explicit Softmax(const AttendParams& params)
      : query_terms(params.query_dtype == DataType::kFloat32 ? 2 : 1) {
    const float cap = params.soft_cap;
    soft_cap = cap > 0.0F ? cap * kLog2E : 0.0F;
    scale = cap > 0.0F ? params.scale / cap * 2.0F * kLog2E : params.scale * kLog2E;
  }
};

// The row and the heads of an item.
struct ItemView {
  int64_t row;
  int kv_head;
  int first_head;

  // `unit`: which of the items that share the list of spans.
  __device__ ItemView(const AttendParams& params, int64_t list, int unit) {
    const int lists = params.num_selection_heads;
    row = list / lists;
    const int list_head = static_cast<int>(list - row * lists) + unit;
    if (lists == params.num_query_heads) {
      first_head = list_head;
      kv_head = list_head * params.kv.num_kv_heads / params.num_query_heads;
    } else {
      kv_head = list_head;
      first_head = list_head * params.num_query_heads / params.kv.num_kv_heads;
    }
  }
};

// The place in the ring of stages. A wait for `full` takes the parity, one for `empty` its
// complement.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next(int num_stages) {
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A tile of rows of kRowBytes, which begins `row` rows after byte `offset` of the arena, in
// kCopies boxes, a plane each; 1: the box has all planes.
template <int kRowBytes, int kCopies>
__device__ __forceinline__ void copy_tile(const CUtensorMap* map,
                                          uint64_t offset,
                                          int row,
                                          uint32_t destination,
                                          uint32_t barrier,
                                          uint64_t policy) {
  const auto first_row = static_cast<int32_t>(offset / kRowBytes) + row;
  const auto first_plane = static_cast<int32_t>(offset % kRowBytes) / kPlaneRowBytes;
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    ptx::copy_tensor_3d(
        destination + i * kPlaneBytes, map, barrier, 0, first_row, first_plane + i, policy);
  }
}

}  // namespace longspan::cuda::decode
