// Device code of the sparse decode step: what a block works on, its shared memory, and the pages it
// attends to.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "kernels/cuda/convert.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/search_query.h"
#include "kernels/cuda/sparse_decode.h"
#include "kernels/cuda/top_k.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda::sparse {

inline constexpr int kWorkerThreads = kSparseWorkerWarps * kWarpSize;
inline constexpr int kThreads = kSparseWarps * kWarpSize;
inline constexpr int kCopyWarp = kSparseWorkerWarps;
inline constexpr int kWatchWarp = kSparseWorkerWarps + 1;
inline constexpr int kHeadPlaces = 16;  // of a list's heads in tables
inline constexpr int kWorkerBarrier = 1;
inline constexpr int kPlaneRowBytes = 128;  // a row of 64 elements, the width of the swizzle
inline constexpr int kPlaneBytes = kPageTokens * kPlaneRowBytes;

struct KernelArgs {
  CUtensorMap page_map;  // boxes of 64 rows and all planes
  SparseDecodeArgs step;
  SparsePlan plan;
  float logit_scale;  // to base 2; with a soft cap as scale_logits has it
  float soft_cap;     // in base 2; 0: none
};

// A page of the context to attend to.
struct Item {
  const std::byte* page;
  uint64_t tokens;  // which of its 64; 0: nothing, and nothing was copied
};
static_assert(sizeof(Item) == kSparseItemBytes);

// What the warps of a block tell one another.
struct State {
  int64_t num_tokens;
  int begin;  // candidates
  int end;
  int k;
  uint32_t threshold;  // of ordered scores
  uint32_t num_survivors;
  uint32_t refined;                    // this block's survivors, counted anew
  uint32_t counts[kSparseMaxCluster];  // survivors of each block
  uint32_t refined_counts[2][kSparseMaxCluster];
  float maxima[kHeadPlaces];
};
static_assert(sizeof(State) <= kSparseStateBytes);

// What a block has to do: blocks [rank] of a cluster share a list of a row.
struct Unit {
  int64_t row;
  int list;  // of the row
  int kv_head;
  int first_head;  // among all query heads
  int num_heads;
  int rank;
  int size;  // a power of two
  int size_log2;

  __device__ explicit Unit(const KernelArgs& args) {
    const SearchShape& shape = args.step.shape.search;
    size = args.plan.cluster_size;
    size_log2 = __ffs(size) - 1;
    rank = static_cast<int>(blockIdx.x) & (size - 1);
    const int index = static_cast<int>(blockIdx.x) >> size_log2;
    const int lists_of_head = shape.lists();
    const int lists = shape.num_kv_heads * lists_of_head;
    row = shape.num_rows == 1 ? 0 : index / lists;
    list = index - static_cast<int>(row) * lists;
    kv_head = lists_of_head == 1 ? list : list / lists_of_head;
    num_heads = shape.group() / lists_of_head;
    first_head = list * num_heads;
  }

  // What there are several of is dealt to the blocks in turn: whether this one has number `index`,
  // as which of its own, and how many of `count` it has.
  __device__ bool owns(int index) const { return (index & (size - 1)) == rank; }
  __device__ int place(int index) const { return index >> size_log2; }
  __device__ int share(int count) const { return (count - rank + size - 1) >> size_log2; }
};

struct Memory {
  unsigned char* base;
  const SparseLayout& layout;

  __device__ State& state() const { return *reinterpret_cast<State*>(base + layout.state); }
  __device__ Item* items() const { return reinterpret_cast<Item*>(base + layout.items); }
  __device__ uint32_t* keys() const { return reinterpret_cast<uint32_t*>(base + layout.keys); }
  __device__ uint32_t* maxima() const { return reinterpret_cast<uint32_t*>(base + layout.maxima); }
  __device__ uint64_t* survivors() const {
    return reinterpret_cast<uint64_t*>(base + layout.survivors);
  }
  __device__ uint64_t* segments() const {
    return reinterpret_cast<uint64_t*>(base + layout.segments);
  }
  __device__ uint64_t* list() const { return reinterpret_cast<uint64_t*>(base + layout.list); }
  __device__ int* ranks() const { return reinterpret_cast<int*>(base + layout.ranks); }

  // Barriers, by shared address.
  __device__ uint32_t full(int stage) const { return barrier(stage); }
  __device__ uint32_t empty(int stage) const { return barrier(kSparseMaxStages + stage); }
  __device__ uint32_t page_full(int slot) const { return barrier(2 * kSparseMaxStages + slot); }
  __device__ uint32_t page_empty(int slot) const {
    return barrier(2 * kSparseMaxStages + kSparseMaxSlots + slot);
  }
  __device__ uint32_t maxima_full() const {
    return barrier(2 * kSparseMaxStages + 2 * kSparseMaxSlots);
  }
  __device__ uint32_t survivors_full() const {
    return barrier(2 * kSparseMaxStages + 2 * kSparseMaxSlots + 1);
  }

 private:
  __device__ uint32_t barrier(int index) const {
    return ptx::shared_address(base) + static_cast<uint32_t>(layout.barriers + index * 8);
  }
};

__device__ __forceinline__ Memory block_memory(const KernelArgs& args) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return {shared_memory, args.plan.layout};
}

// One thread, before any other uses them.
__device__ __forceinline__ void init_barriers(const KernelArgs& args, const Memory& memory) {
  const SparsePlan& plan = args.plan;
#pragma unroll 1
  for (int i = 0; i < plan.num_stages; ++i) {
    ptx::barrier_init(memory.full(i), 1);
    ptx::barrier_init(memory.empty(i), kSparseWorkerWarps);
  }
#pragma unroll 1
  for (int i = 0; i < plan.num_slots; ++i) {
    ptx::barrier_init(memory.page_full(i), 1);
    ptx::barrier_init(memory.page_empty(i), kSparseWorkerWarps);
  }
  ptx::barrier_init(memory.maxima_full(), 1);
  ptx::barrier_init(memory.survivors_full(), static_cast<uint32_t>(plan.cluster_size));
  ptx::barrier_init_fence();
  ptx::barrier_arrive_expect(
      memory.maxima_full(),
      static_cast<uint32_t>(plan.cluster_size * kSparseWorkerWarps * plan.groups_per_warp * 4));
}

// The pages whose blocks or tokens are forced: [0, first) and [last_begin, own].
class Forced {
 public:
  __device__ Forced(const ForcedTokens& forced, int64_t num_tokens)
      : forced_(forced), num_tokens_(num_tokens) {
    const auto pages = static_cast<int>((num_tokens + kPageTokens - 1) / kPageTokens);
    const auto sinks = static_cast<int>((forced.sink_tokens + kPageTokens - 1) / kPageTokens);
    end_ = pages;
    first_ = min(pages, max(forced.first_blocks, sinks));
    last_begin_ = max(0, pages - forced.last_blocks);
    if (forced.window_tokens > 0) {
      last_begin_ =
          min(last_begin_,
              static_cast<int>(max(int64_t{0}, num_tokens - forced.window_tokens) / kPageTokens));
    }
    last_begin_ = max(last_begin_, first_);
  }

  __device__ int count() const { return first_ + end_ - last_begin_; }
  __device__ int page(int index) const {
    return index < first_ ? index : last_begin_ + index - first_;
  }
  // -1: not forced.
  __device__ int index(int page) const {
    if (page < first_) {
      return page;
    }
    return page >= last_begin_ && page < end_ ? page - last_begin_ + first_ : -1;
  }
  // The tokens of a page that the row sees.
  __device__ uint64_t visible(int page) const { return below(num_tokens_, page); }
  // Those that are forced.
  __device__ uint64_t tokens(int page) const {
    if (page < forced_.first_blocks || page >= end_ - forced_.last_blocks) {
      return visible(page);
    }
    const uint64_t sinks = below(forced_.sink_tokens, page);
    const uint64_t window = ~below(num_tokens_ - forced_.window_tokens, page);
    return visible(page) & (sinks | (forced_.window_tokens > 0 ? window : 0));
  }

 private:
  // The tokens of a page that are before token `end` of the context.
  static __device__ uint64_t below(int64_t end, int page) {
    const int64_t count = end - static_cast<int64_t>(page) * kPageTokens;
    return count <= 0 ? 0 : (count >= kPageTokens ? ~uint64_t{0} : (uint64_t{1} << count) - 1);
  }

  const ForcedTokens& forced_;
  int64_t num_tokens_;
  int first_;
  int last_begin_;
  int end_;
};

// Copies keys and values of a page into a slot of the ring. One thread; the slot is empty.
template <int kDim>
__device__ __forceinline__ void copy_page(const KernelArgs& args,
                                          const Memory& memory,
                                          const Unit& unit,
                                          const std::byte* page,
                                          int slot) {
  constexpr int kRowBytes = kDim * 2;
  constexpr int kTileBytes = kPageTokens * kRowBytes;
  const uint32_t barrier = memory.page_full(slot);
  const uint32_t tile =
      ptx::shared_address(memory.base) + static_cast<uint32_t>(slot) * 2 * kTileBytes;
  const auto offset = static_cast<uint64_t>(page - args.step.kv.arena);
  ptx::barrier_arrive_expect(barrier, 2 * kTileBytes);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint64_t part = offset + (i == 0 ? 0 : args.step.kv.value_offset_bytes());
    ptx::copy_tensor_3d(tile + i * kTileBytes,
                        &args.page_map,
                        barrier,
                        0,
                        static_cast<int32_t>(part / kRowBytes) + unit.kv_head * kPageTokens,
                        static_cast<int32_t>(part % kRowBytes) / kPlaneRowBytes,
                        ptx::kEvictNormal);
  }
}

// Starts the copy of an item into a slot that is empty. One thread.
template <int kDim>
__device__ __forceinline__ void start_item(
    const KernelArgs& args, const Memory& memory, const Unit& unit, int slot, const Item& item) {
  if (item.tokens == 0) {
    ptx::barrier_arrive(memory.page_full(slot));
  } else {
    copy_page<kDim>(args, memory, unit, item.page, slot);
  }
}

}  // namespace longspan::cuda::sparse
