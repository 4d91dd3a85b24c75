// Device code of attend_decode.cu: the kernel that attends.
//
// A block is one producer warp and sets of four consumer warps. The producer walks over the block's
// slices and brings them by TMA into a ring of stages, each one page of keys and values of one KV
// head, or up to four slices of 16 tokens from several pages. Of every stage a warp takes 16
// tokens, for the query heads of its set; at the end of an item the four warps of a set are joined.
#pragma once

#include <cstdint>

#include "kernels/cuda/convert.h"
#include "kernels/cuda/decode_attend.h"
#include "kernels/cuda/decode_join.h"
#include "kernels/cuda/decode_lists.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/decode_shape.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda::decode {

inline constexpr int kSetThreads = kSetWarps * kWarpSize;
inline constexpr int kSetBarrier = 1;  // the named barrier of set 0

template <class S>
inline constexpr int kDecodeThreads = kWarpSize*(1 + S::kSets * kSetWarps);
// Fragments that are joined at a time.
template <class S>
inline constexpr int kRoundFragments = S::kFragments < 8 ? S::kFragments : 8;

// Of a stage, from the producer to the consumers.
struct StageInfo {
  uint32_t ranges;  // byte w: tokens of warp w's slice, the first | the last << 4
  uint32_t last;    // whether the item ends
};
inline constexpr uint32_t kEmptyRange = 0x0F;

struct DecodeKernelArgs {
  CUtensorMap key_pages;   // boxes of 64 rows
  CUtensorMap key_slices;  // boxes of 16 rows
  CUtensorMap value_pages;
  CUtensorMap value_slices;
  AttendParams params;
  const std::byte* const* const* row_pages;
  DecodePlan plan;
  Softmax softmax;
  const int64_t* list_starts;  // [T * S + 1] and
  const int32_t* list_slices;  // [T * S] of DecodeCursor; null with plan_in_kernel
  DecodeParts* item_parts;     // [items]
  float* part_lse;             // [2 * num_blocks][heads_per_item], base 2
  float* part_out;             // [2 * num_blocks][heads_per_item][E]
};

// Byte offsets in shared memory. The stages come first, aligned for the swizzle.
struct DecodeLayout {
  int join;        // [sets][4 warps][kRoundFragments][32 lanes][4]
  int query;       // [sets][terms][kHeadTiles][kKeySteps][32 lanes][2 registers]
  int statistics;  // [sets][4 warps][kHeads]
  int starts;      // [kMaxListsInKernel + 1], int64
  int slices;      // [kMaxListsInKernel], int32
  int infos;       // [stages]
  int full;        // [stages] barriers
  int empty;       // [stages] barriers
  int end;
};

template <class S>
constexpr DecodeLayout decode_layout(int num_stages, int query_terms) {
  constexpr int kJoinBytes = kSetWarps * kRoundFragments<S> * kWarpSize * 16;
  DecodeLayout layout = {};
  layout.join = num_stages * S::kStageBytes;
  layout.query = layout.join + S::kSets * kJoinBytes;
  layout.statistics = layout.query + S::kSets * query_bytes<S>(query_terms);
  layout.starts = layout.statistics +
                  S::kSets * kSetWarps * S::kHeads * static_cast<int>(sizeof(WarpStatistics));
  layout.slices = layout.starts + (kMaxListsInKernel + 1) * 8;
  layout.infos = layout.slices + kMaxListsInKernel * 4;
  layout.full = layout.infos + num_stages * static_cast<int>(sizeof(StageInfo));
  layout.empty = layout.full + num_stages * 8;
  layout.end = layout.empty + num_stages * 8;
  return layout;
}

// By the whole block: kMaxListsInKernel lists at most.
__device__ __forceinline__ void plan_in_block(const DecodeKernelArgs& args,
                                              int64_t* starts,
                                              int32_t* slices) {
  const auto num_lists = static_cast<int>(args.params.num_rows * args.params.num_selection_heads);
  const auto num_threads = static_cast<int>(blockDim.x);
  const auto thread = static_cast<int>(threadIdx.x);
  int lanes = kWarpSize;
  while (num_lists * lanes > num_threads) {
    lanes /= 2;
  }
  const int list = thread / lanes;
  const int64_t count = count_slices(args.params, list, thread % lanes, lanes);
  if (list < num_lists && thread % lanes == 0) {
    slices[list] = static_cast<int32_t>(count);
  }
  __syncthreads();
  if (thread < kWarpSize) {
    static_assert(kMaxListsInKernel == 2 * kWarpSize);
    const auto length = [&](int i) {
      return i < num_lists ? item_length(slices[i], args.plan.overhead) : 0;
    };
    const int64_t first = length(2 * thread);
    const int64_t second = length(2 * thread + 1);
    const int64_t end = warp_inclusive_sum(first + second, thread);
    if (thread == 0) {
      starts[0] = 0;
    }
    starts[2 * thread + 1] = end - second;
    starts[2 * thread + 2] = end;
  }
  __syncthreads();
}

struct ProducerView {
  uint32_t stages;  // shared addresses
  uint32_t full;
  uint32_t empty;
  StageInfo* infos;
  uint64_t policy;
};

// Fills one stage with the batch's lanes [first, first + taken).
template <class S>
__device__ __forceinline__ void fill_stage(const DecodeKernelArgs& args,
                                           const ProducerView& view,
                                           const Ring& ring,
                                           const SliceBatch& batch,
                                           int first,
                                           int taken,
                                           bool ends_item,
                                           int kv_head,
                                           int lane) {
  constexpr int kKeyRowBytes = S::kKeyDim * 2;
  constexpr int kValueRowBytes = S::kValueDim * 2;
  uint32_t ranges = 0;
#pragma unroll
  for (int i = 0; i < kSlicesPerPage; ++i) {
    const uint32_t range = __shfl_sync(kFullWarp, batch.range, (first + i) % kWarpSize);
    ranges |= (i < taken ? range : kEmptyRange) << (8 * i);
  }
  const uint32_t full = view.full + ring.stage * 8;
  ptx::barrier_wait(view.empty + ring.stage * 8, ring.parity ^ 1);
  if (lane == first) {
    view.infos[ring.stage] = {ranges, ends_item ? 1U : 0U};
    ptx::barrier_arrive_expect(full, static_cast<uint32_t>(taken * S::kSliceBytes));
  }
  __syncwarp();
  const auto key = static_cast<uint64_t>(batch.page - args.params.kv.arena);
  const uint64_t value = key + args.params.kv.value_offset_bytes();
  const uint32_t key_tile = view.stages + ring.stage * S::kStageBytes;
  const uint32_t value_tile = key_tile + S::kKeyTileBytes;
  int row = kv_head * kPageTokens;
  if ((batch.whole_pages >> first & 1) != 0) {
    if (lane == first) {
      copy_tile<kKeyRowBytes, 1>(&args.key_pages, key, row, key_tile, full, view.policy);
      copy_tile<kValueRowBytes, 1>(&args.value_pages, value, row, value_tile, full, view.policy);
    }
  } else if (lane >= first && lane < first + taken) {
    const uint32_t shift = (lane - first) * kSliceTokens * kPlaneRowBytes;
    row += batch.slice % kSlicesPerPage * kSliceTokens;
    copy_tile<kKeyRowBytes, S::kKeyPlanes>(
        &args.key_slices, key, row, key_tile + shift, full, view.policy);
    copy_tile<kValueRowBytes, S::kValuePlanes>(
        &args.value_slices, value, row, value_tile + shift, full, view.policy);
  }
}

template <class S>
__device__ void produce(const DecodeKernelArgs& args,
                        const ProducerView& view,
                        DecodeCursor cursor) {
  const AttendParams& params = args.params;
  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  Ring ring;
  for (; cursor.valid(); cursor.next()) {
    const DecodeItem& item = cursor.item();
    const ItemView heads(params, item.list, item.unit);
    const int64_t first_span = params.span_offsets[item.list];
    SliceWalker walker(params.spans + first_span,
                       params.span_offsets[item.list + 1] - first_span,
                       args.row_pages == nullptr ? params.kv.pages : args.row_pages[heads.row],
                       lane);
    const auto end = static_cast<int>(item.end);
    SliceBatch batch = walker.next(static_cast<int>(item.begin), end);
    while (batch.count > 0) {
      // Its pages' addresses are on their way while this batch is copied.
      const SliceBatch following = walker.next(batch.position + batch.count, end);
      for (int first = 0; first < batch.count;) {
        // Up to four slices, but a whole page has a stage for itself.
        const int to_whole_page = __ffs(static_cast<int>(batch.whole_pages >> first >> 1));
        int taken = min(kSlicesPerPage, batch.count - first);
        if ((batch.whole_pages >> first & 1) == 0 && to_whole_page > 0) {
          taken = min(taken, to_whole_page);
        }
        const bool ends_item = batch.position + first + taken == end;
        fill_stage<S>(args, view, ring, batch, first, taken, ends_item, heads.kv_head, lane);
        ring.next(args.plan.num_stages);
        first += taken;
      }
      batch = following;
    }
  }
}

// Where the output of an item goes, for the heads of one set.
struct Destination {
  const AttendParams* params;
  int64_t row;
  int first_head;   // of the set's, among all query heads
  int num_heads;    // of the set
  float* part_lse;  // [num_heads]; null: the output is whole
  float* part_out;  // [num_heads][E]
};

__device__ __forceinline__ void store_lse(const Destination& to, int head, float lse) {
  if (head >= to.num_heads) {
    return;
  }
  if (to.part_lse != nullptr) {
    to.part_lse[head] = lse;
  } else {
    const AttendParams& params = *to.params;
    params.lse[to.row * params.num_query_heads + to.first_head + head] = lse * kLn2;
  }
}

template <class S>
__device__ __forceinline__ void store_out(const Destination& to,
                                          int head,
                                          int channel,
                                          float value) {
  if (head >= to.num_heads) {
    return;
  }
  if (to.part_out != nullptr) {
    to.part_out[head * S::kValueDim + channel] = value;
  } else if (to.params->out != nullptr) {
    const AttendParams& params = *to.params;
    const int64_t out_row = to.row * params.num_query_heads + to.first_head + head;
    store_as(params.out_dtype, params.out, out_row * S::kValueDim + channel, value);
  }
}

// Joins the sums of a set's four warps and stores them.
template <class S>
__device__ __forceinline__ void join_warps(const Accumulator<S>& sums,
                                           const WarpJoin<kSetWarps>& join,
                                           const Destination& to) {
  float weights[S::kHeadTiles][2];
  float lse[S::kHeadTiles][2];
  weigh_warps(sums, join, weights, lse);
#pragma unroll
  for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (join.warp == 0 && join.lane < 4) {
        store_lse(to, n * 8 + join.lane * 2 + c, lse[n][c]);
      }
    }
  }
  constexpr int kRound = kRoundFragments<S>;
  static_assert(S::kFragments % kRound == 0 && kRound % kSetWarps == 0);
#pragma unroll
  for (int first = 0; first < S::kFragments; first += kRound) {
    share_fragments<S, kSetWarps, kRound>(sums, join, weights, first);
    join.sync();
#pragma unroll
    for (int i = join.warp; i < kRound; i += kSetWarps) {
      const float4 total = sum_fragment<kSetWarps, kRound>(join, i);
      const FragmentPlace<S> place(first + i, join.lane);
      store_out<S>(to, place.head, place.channel, total.x);
      store_out<S>(to, place.head + 1, place.channel, total.y);
      store_out<S>(to, place.head, place.channel + 8, total.z);
      store_out<S>(to, place.head + 1, place.channel + 8, total.w);
    }
    join.sync();
  }
}

// What a set of warps needs to know of its block.
struct BlockView {
  std::byte* stages;
  const StageInfo* infos;
  uint32_t full;
  uint32_t empty;
};

// The slices that a warp has in one item's stages.
template <class S>
__device__ __forceinline__ void attend_item(const DecodeKernelArgs& args,
                                            const BlockView& block,
                                            const ConsumerView& view,
                                            int64_t most_stages,
                                            Ring& ring,
                                            Accumulator<S>& sums) {
  bool last_stage = false;
  for (int64_t i = 0; i < most_stages && !last_stage; ++i) {
    ptx::barrier_wait(block.full + ring.stage * 8, ring.parity);
    const StageInfo info = block.infos[ring.stage];
    const uint32_t range = info.ranges >> (8 * view.warp) & 0xFF;
    const auto first = static_cast<int>(range & 0xF);
    const auto last = static_cast<int>(range >> 4);
    if (first <= last) {
      attend_slice(
          args.softmax, view, block.stages + ring.stage * S::kStageBytes, first, last, sums);
    }
    __syncwarp();
    if (view.lane == 0) {
      ptx::barrier_arrive(block.empty + ring.stage * 8);
    }
    last_stage = info.last != 0;
    ring.next(args.plan.num_stages);
  }
}

// An item without slices: nothing to attend to.
template <class S>
__device__ void store_empty(const Destination& to, int thread) {
  for (int i = thread; i < to.num_heads * S::kValueDim; i += kSetThreads) {
    store_out<S>(to, i / S::kValueDim, i % S::kValueDim, 0.0F);
  }
  for (int head = thread; head < to.num_heads; head += kSetThreads) {
    store_lse(to, head, -kInfinity);
  }
}

template <class S>
__device__ void consume(const DecodeKernelArgs& args,
                        const BlockView& block,
                        const ConsumerView& view,
                        const WarpJoin<kSetWarps>& join,
                        int set,
                        uint32_t* queries,
                        DecodeCursor cursor,
                        int64_t block_positions) {
  const DecodePlan& plan = args.plan;
  const int thread = view.warp * kWarpSize + view.lane;
  const int set_head = set * S::kHeads;
  Ring ring;
  for (; cursor.valid(); cursor.next()) {
    const DecodeItem& item = cursor.item();
    const ItemView heads(args.params, item.list, item.unit);
    const DecodeParts parts = item_parts(item.start, item.slices, plan.overhead, block_positions);
    if (cursor.owns() && set == 0 && thread == 0) {
      args.item_parts[item.list * plan.heads.units_per_list + item.unit] = parts;
    }
    Destination to = {&args.params,
                      heads.row,
                      heads.first_head + set_head,
                      min(S::kHeads, plan.heads.heads_per_item - set_head),
                      nullptr,
                      nullptr};
    if (item.begin >= item.end) {
      if (item.slices == 0 && cursor.owns()) {
        store_empty<S>(to, thread);
      }
      continue;
    }
    if (parts.num_parts > 1) {
      const int64_t slot = part_slot(parts, static_cast<int>(blockIdx.x));
      to.part_lse = args.part_lse + slot * plan.heads.heads_per_item + set_head;
      to.part_out = args.part_out + (slot * plan.heads.heads_per_item + set_head) * S::kValueDim;
    }
    load_queries<S, kSetThreads>(args.params,
                                 args.softmax.query_terms,
                                 heads.row,
                                 to.first_head,
                                 to.num_heads,
                                 queries,
                                 thread);
    join.sync();
    Accumulator<S> sums;
    attend_item(args, block, view, item.end - item.begin, ring, sums);
    join_warps(sums, join, to);
  }
}

template <class S>
__global__ void __launch_bounds__(kDecodeThreads<S>, 1)
    attend_decode_kernel(const __grid_constant__ DecodeKernelArgs args) {
  extern __shared__ __align__(1024) std::byte shared[];
  const DecodePlan& plan = args.plan;
  const DecodeLayout layout = decode_layout<S>(plan.num_stages, args.softmax.query_terms);
  const auto warp = static_cast<int>(threadIdx.x / kWarpSize);
  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  const uint32_t full = ptx::shared_address(shared + layout.full);
  const uint32_t empty = ptx::shared_address(shared + layout.empty);
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.num_stages; ++i) {
      ptx::barrier_init(full + i * 8, 1);
      ptx::barrier_init(empty + i * 8, S::kSets * kSetWarps);
    }
    ptx::barrier_init_fence();
    ptx::prefetch_tensor_map(&args.key_pages);
    ptx::prefetch_tensor_map(&args.value_pages);
  }
  ptx::wait_for_dependencies();
  ptx::launch_dependents();

  const int64_t* starts = args.list_starts;
  const int32_t* slices = args.list_slices;
  if (plan.plan_in_kernel) {
    auto* own_starts = reinterpret_cast<int64_t*>(shared + layout.starts);
    auto* own_slices = reinterpret_cast<int32_t*>(shared + layout.slices);
    plan_in_block(args, own_starts, own_slices);
    starts = own_starts;
    slices = own_slices;
  }
  __syncthreads();

  const int64_t num_lists = args.params.num_rows * args.params.num_selection_heads;
  const int64_t positions =
      block_length(starts[num_lists] * plan.heads.units_per_list, static_cast<int>(gridDim.x));
  const DecodeCursor cursor(starts,
                            slices,
                            num_lists,
                            plan.heads.units_per_list,
                            plan.overhead,
                            positions,
                            static_cast<int>(blockIdx.x));
  auto* infos = reinterpret_cast<StageInfo*>(shared + layout.infos);
  if (warp == 0) {
    const uint64_t policy = plan.evict_first ? ptx::kEvictFirst : ptx::kEvictNormal;
    produce<S>(args, {ptx::shared_address(shared), full, empty, infos, policy}, cursor);
    return;
  }
  const int set = (warp - 1) / kSetWarps;
  const int set_warp = (warp - 1) % kSetWarps;
  constexpr int kJoinSize = kSetWarps * kRoundFragments<S> * kWarpSize;
  const WarpJoin<kSetWarps> join = {
      reinterpret_cast<float4*>(shared + layout.join) + set * kJoinSize,
      reinterpret_cast<WarpStatistics*>(shared + layout.statistics) + set * kSetWarps * S::kHeads,
      kSetBarrier + set,
      kSetThreads,
      set_warp,
      lane};
  auto* queries = reinterpret_cast<uint32_t*>(shared + layout.query +
                                              set * query_bytes<S>(args.softmax.query_terms));
  const ConsumerView view(lane, set_warp, ptx::shared_address(queries));
  consume<S>(args, {shared, infos, full, empty}, view, join, set, queries, cursor, positions);
}

}  // namespace longspan::cuda::decode
