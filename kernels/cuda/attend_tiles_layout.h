// Attention of many rows on Hopper: what its warps share. How a block of threads is cut, the ring
// of keys and values in shared memory, and the notes that go with them. attend_tiles.cu has the
// whole picture.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/attend_repair.h"
#include "kernels/cuda/attend_tiles.h"
#include "kernels/cuda/convert.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/tiles.h"

namespace longspan::cuda::tiles {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupRows = 64;
inline constexpr int kPlaneElements = 64;  // columns of a plane of shared memory, 128 bytes
inline constexpr int kPlaneRowBytes = 128;
inline constexpr int kPagePlaneBytes = kPageTokens * kPlaneRowBytes;
inline constexpr uint32_t kAllLanes = 0xffffffffU;
inline constexpr float kInfinity = INFINITY;

// What a kernel is compiled for. T: the type of queries, keys and values.
template <class T_, int kKeyDim_, int kValueDim_, int kTileRows_, bool kSoftCap_>
struct Tiling {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kTileRows = kTileRows_;
  static constexpr bool kSoftCap = kSoftCap_;

  static constexpr int kKeyPlanes = kKeyDim / kPlaneElements;
  static constexpr int kValuePlanes = kValueDim / kPlaneElements;
  static constexpr int kWarpgroups = kTileRows / kWarpgroupRows;
  static constexpr int kConsumerWarps = kWarpgroups * 4;
  // Warpgroups that have the SM for themselves get their registers from the lister's.
  static constexpr bool kLarge = kWarpgroups > 1;
  // Scores of 128 columns where a warpgroup has the registers for them beside a row of the output.
  static constexpr bool kWideStep =
      (kWarpgroups == 2 && kValueDim <= 128) || (kWarpgroups == 3 && kValueDim <= 64);
  static constexpr int kStepPages = kWideStep ? 2 : 1;
  static constexpr int kStepTokens = kStepPages * kPageTokens;
  // All warpgroups do all steps, one after another on the tensor cores, so that the softmax of one
  // hides behind the products of another.
  static constexpr bool kTakesTurns = kWideStep;
  // Small tiles serve scattered lists, where the lister has no time to lose: it copies values
  // behind the keys of the next step, in the order in which they are used and their places get
  // free, and looks up early what comes next. Large tiles serve common lists; their lister has few
  // registers.
  static constexpr bool kLooksAhead = !kLarge;
  static constexpr int kMaxLists = kTileRows == 192 ? 64 : kTileRows;
  static constexpr int kBlocksPerSm = kLarge || kValueDim > 128 ? 1 : 2;
  // The lister and query warps; where registers move between warpgroups, a whole warpgroup.
  static constexpr int kThreads = kConsumerWarps * kWarpSize + (kLarge ? kWarpgroupThreads : 64);
  // 64K registers a block. Where scores of 128 columns leave the lister 32, it keeps some of its
  // state in local memory.
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 216 : 160;
  static constexpr int kListerRegisters = kWarpgroups == 2 ? 72 : 32;
  static_assert(!kLarge || kConsumerRegisters * kWarpgroups + kListerRegisters <=
                               65536 / kThreads / 8 * 8 * (kWarpgroups + 1));

  static constexpr int kQueryBytes = kTileRows * kKeyDim * 2;
  static constexpr int kPlaneBytes = kStepTokens * kPlaneRowBytes;
  static constexpr int kKeyStepBytes = kKeyPlanes * kPlaneBytes;
  static constexpr int kValueStepBytes = kValuePlanes * kPlaneBytes;
  // Two blocks with three stages of 128 columns fill the SM to the last KiB: what is small has to
  // fit in what it takes, for a stage less costs a quarter of the speed.
  static constexpr int kColumnBytes = kStepPages * kMaxLists * 8;
  static constexpr int kSmallBytes = kColumnBytes + 512;
  static constexpr int kSharedBytes = kBlocksPerSm == 2 ? 115712 : 232448;
  static constexpr int kStages =
      std::min(6, (kSharedBytes - kSmallBytes - kQueryBytes) / (kKeyStepBytes + kValueStepBytes));
  static_assert(kStages >= 2 && (kBlocksPerSm == 1 || kKeyDim > 128 || kStages >= 3));

  // Columns of O in one wgmma.
  static constexpr int kOutBlock = std::min(kValueDim, 128);
  static constexpr int kOutBlocks = kValueDim / kOutBlock;
};

// What the rows of a tile see of a page.
enum class PageView : uint32_t {
  kAll,     // every list sees the whole page
  kLists,   // the lists in StepNote::lists see the whole page, the others nothing
  kColumns  // list i sees the tokens in columns[i]
};

// Whether the tile has steps behind this one. A tile without any has one empty step.
enum class StepEnd : uint32_t { kMore, kLast, kEmpty };

// A step in one word: bits 0-1 its StepEnd, then two bits a page its PageView, and from bit 8 on
// eight bits a page its tail: the tokens in it if it is a part of a page, else 0.
__device__ __forceinline__ uint32_t page_word(int page, PageView view, uint32_t tail) {
  return static_cast<uint32_t>(view) << (2 + 2 * page) | tail << (8 + 8 * page);
}
__device__ __forceinline__ StepEnd end_of(uint32_t word) { return static_cast<StepEnd>(word & 3); }
__device__ __forceinline__ PageView view_of(uint32_t word, int page) {
  return static_cast<PageView>(word >> (2 + 2 * page) & 3);
}
__device__ __forceinline__ uint32_t tail_of(uint32_t word, int page) {
  return word >> (8 + 8 * page) & 0xff;
}

template <class C>
struct StepNote {
  uint32_t word;
  uint32_t lists[C::kStepPages][C::kMaxLists / 32];  // bit i: list i sees some of the page
};

template <class C>
struct Shared {
  alignas(1024) uint8_t query[C::kQueryBytes];               // [plane][row][64]
  alignas(1024) uint8_t keys[C::kStages][C::kKeyStepBytes];  // [plane][token][64]
  alignas(1024) uint8_t values[C::kStages][C::kValueStepBytes];
  // One step's; the steps with such pages are few.
  uint64_t columns[C::kStepPages][C::kMaxLists];
  StepNote<C> notes[C::kStages];
  uint64_t query_full, query_empty;
  uint64_t keys_full[C::kStages], keys_empty[C::kStages];
  uint64_t values_full[C::kStages], values_empty[C::kStages];
  uint64_t item_full[2], item_empty[2];
  int32_t items[2];
};

struct KernelParams {
  AttendParams params;
  TileOrder order;
  int32_t* next_item;
  RepairList repairs;     // rows whose output is not finite though their logits are
  int group;              // query heads of a KV head
  int tokens;             // of a tile
  int box_tokens;         // of a copy of queries
  int token_lists;        // lists of a token in a tile: 1, or one a head
  float exponent_factor;  // from q.k, or the capped logit, to the exponent of 2
  float cap_factor;       // soft cap: 2 log2(e) / cap
};

struct TensorMaps {
  CUtensorMap query;
  CUtensorMap keys;
  CUtensorMap values;
};

// A place in the ring.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ void wait(const uint64_t& barrier, uint32_t phase) {
  ptx::barrier_wait(ptx::shared_address(&barrier), phase);
}

__device__ __forceinline__ void arrive(const uint64_t& barrier) {
  ptx::barrier_arrive(ptx::shared_address(&barrier));
}

}  // namespace longspan::cuda::tiles
