// Split-KV decode over lists of pages: attend_pages.h.
//
// An item, one query row and one KV head, has a cluster of blocks of its own, which deal out the
// entries of its list among them. In a block one warp brings pages by TMA into a ring of stages,
// and four or eight warps attend to them, four to a page and 16 tokens each. The blocks' parts meet
// in shared memory: block r of a cluster joins the r-th share of the channels, and every block
// sends it what it has of them. So nothing is counted, and nothing goes through global memory.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/attend_pages.h"
#include "kernels/cuda/convert.h"
#include "kernels/cuda/decode_attend.h"
#include "kernels/cuda/decode_join.h"
#include "kernels/cuda/decode_launch.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/decode_shape.h"
#include "kernels/cuda/ptx.h"

namespace longspan::cuda {
namespace decode {
namespace {

constexpr int kConsumerBarrier = 1;  // a named barrier
constexpr int kMinStages = 2;

// Warps that attend: four where each needs more registers than a third of them leaves it.
template <class S>
constexpr int kConsumerWarps = S::kFragments > 16 ? 4 : 8;
template <class S>
constexpr int kConsumerThreads = kConsumerWarps<S>* kWarpSize;
template <class S>
constexpr int kPagesThreads = kWarpSize + kConsumerThreads<S>;
// Blocks that fit on an SM with their registers: with two, a launch can begin on the SMs of the one
// in front of it.
template <class S>
constexpr int kBlocksPerSm = S::kFragments > 8 ? 1 : 2;
// Warps of a set of heads, and teams of four among them that take turns at the pages.
template <class S>
constexpr int kWarpsOfSet = kConsumerWarps<S> / S::kSets;
template <class S>
constexpr int kTeams = kWarpsOfSet<S> / kSetWarps;
// Places for the heads of all sets.
template <class S>
constexpr int kAllHeads = S::kSets* S::kHeads;

struct PagesKernelArgs {
  CUtensorMap key_pages;  // boxes of 64 rows
  CUtensorMap value_pages;
  AttendParams params;
  const std::byte* const* const* row_pages;
  const PageTokens* page_lists;
  int64_t max_pages;
  PagesPlan plan;
  int channels_per_block;  // that each block of a cluster joins
  Softmax softmax;
};

// Byte offsets in shared memory. The stages come first, aligned for the swizzle; once all pages are
// done with, the warps' fragments lie there: [sets][warps of a set][kFragments][32 lanes][4].
struct PagesLayout {
  int query;       // [sets][terms][kHeadTiles][kKeySteps][32 lanes][2 registers]
  int part_out;    // [cluster size][channels of this block][kAllHeads], from all blocks
  int part_lse;    // [cluster size][kAllHeads], base 2
  int statistics;  // [sets][warps of a set][kHeads]
  int entries;     // [stages], of the list
  int full;        // [stages] barriers
  int empty;       // [stages] barriers
  int end;
};

template <class S>
constexpr PagesLayout pages_layout(int num_stages, int query_terms) {
  static_assert(kConsumerWarps<S> * S::kFragments * kWarpSize * 16 <= kMinStages * S::kStageBytes);
  PagesLayout layout = {};
  layout.query = num_stages * S::kStageBytes;
  layout.part_out = layout.query + S::kSets * query_bytes<S>(query_terms);
  layout.part_lse = layout.part_out + S::kValueDim * kAllHeads<S> * static_cast<int>(sizeof(float));
  layout.statistics =
      layout.part_lse + kMaxClusterSize * kAllHeads<S> * static_cast<int>(sizeof(float));
  layout.entries =
      layout.statistics + kConsumerWarps<S> * S::kHeads * static_cast<int>(sizeof(WarpStatistics));
  layout.full = layout.entries + num_stages * static_cast<int>(sizeof(PageTokens));
  layout.empty = layout.full + num_stages * 8;
  layout.end = layout.empty + num_stages * 8;
  return layout;
}

// What the warps of a block share.
struct PagesBlock {
  std::byte* stages;
  PageTokens* entries;
  uint32_t full;  // shared addresses
  uint32_t empty;
  int rank;         // of the block in its cluster
  int num_entries;  // that it takes, used or not
  int64_t list;
};

// One entry to one stage, by one thread.
template <class S>
__device__ __forceinline__ void fill_page(const PagesKernelArgs& args,
                                          const PagesBlock& block,
                                          int stage,
                                          const PageTokens& entry,
                                          const std::byte* page,
                                          int kv_head) {
  const uint32_t full = block.full + stage * 8;
  block.entries[stage] = entry;
  if (page == nullptr) {
    ptx::barrier_arrive(full);
    return;
  }
  ptx::barrier_arrive_expect(full, S::kStageBytes);
  const uint64_t policy = args.plan.evict_first ? ptx::kEvictFirst : ptx::kEvictNormal;
  const auto key = static_cast<uint64_t>(page - args.params.kv.arena);
  const uint64_t value = key + args.params.kv.value_offset_bytes();
  const uint32_t key_tile = ptx::shared_address(block.stages) + stage * S::kStageBytes;
  const uint32_t value_tile = key_tile + S::kKeyTileBytes;
  const int row = kv_head * kPageTokens;
  copy_tile<S::kKeyDim * 2, 1>(&args.key_pages, key, row, key_tile, full, policy);
  copy_tile<S::kValueDim * 2, 1>(&args.value_pages, value, row, value_tile, full, policy);
}

// Brings the block's pages, by one warp.
template <class S>
__device__ __forceinline__ void produce_pages(const PagesKernelArgs& args,
                                              const PagesBlock& block,
                                              const ItemView& heads,
                                              int lane) {
  const PageTokens* const list = args.page_lists + block.list * args.max_pages + block.rank;
  const std::byte* const* const pages =
      args.row_pages == nullptr ? args.params.kv.pages : args.row_pages[heads.row];
  Ring ring;
  for (int first = 0; first < block.num_entries; first += kWarpSize) {
    PageTokens entry;
    const std::byte* page = nullptr;
    if (first + lane < block.num_entries) {
      entry = list[static_cast<int64_t>(first + lane) * args.plan.cluster_size];
      page = entry.begin < entry.end ? pages[entry.page] : nullptr;
    }
    const int count = min(kWarpSize, block.num_entries - first);
    for (int i = 0; i < count; ++i) {
      if (lane == i) {
        ptx::barrier_wait(block.empty + ring.stage * 8, ring.parity ^ 1);
        fill_page<S>(args, block, ring.stage, entry, page, heads.kv_head);
      }
      __syncwarp();
      ring.next(args.plan.num_stages);
    }
  }
}

// The slices that a warp has in its team's pages.
template <class S>
__device__ __forceinline__ void attend_pages(const PagesKernelArgs& args,
                                             const PagesBlock& block,
                                             const ConsumerView& view,
                                             int team,
                                             Accumulator<S>& sums) {
  Ring ring;
  for (int i = 0; i < block.num_entries; ++i) {
    // The other team's pages, too, so that no warp misses a phase of a barrier.
    ptx::barrier_wait(block.full + ring.stage * 8, ring.parity);
    if (i % kTeams<S> == team) {
      const PageTokens entry = block.entries[ring.stage];
      const int first = max(entry.begin - view.warp * kSliceTokens, 0);
      const int last = min(entry.end - view.warp * kSliceTokens, kSliceTokens) - 1;
      if (first <= last) {
        std::byte* const stage = block.stages + ring.stage * S::kStageBytes;
        attend_slice(args.softmax, view, stage, first, last, sums);
      }
      __syncwarp();
    }
    if (view.lane == 0) {
      ptx::barrier_arrive(block.empty + ring.stage * 8);
    }
    ring.next(args.plan.num_stages);
  }
}

// Joins the warps of a set and sends each block of the cluster its share of the result: `num_heads`
// heads from `set_head` on.
template <class S>
__device__ __forceinline__ void send_part(const PagesKernelArgs& args,
                                          const PagesBlock& block,
                                          const PagesLayout& layout,
                                          const Accumulator<S>& sums,
                                          const WarpJoin<kWarpsOfSet<S>>& join,
                                          int set_head,
                                          int num_heads) {
  const uint32_t part_out = ptx::shared_address(block.stages + layout.part_out);
  const uint32_t part_lse = ptx::shared_address(block.stages + layout.part_lse);
  constexpr uint32_t kFloatBytes = sizeof(float);
  float weights[S::kHeadTiles][2];
  float lse[S::kHeadTiles][2];
  weigh_warps(sums, join, weights, lse);
  share_fragments<S, kWarpsOfSet<S>, S::kFragments>(sums, join, weights, 0);
  join.sync();
  ptx::cluster_wait();  // until the other blocks have begun: their memory is not theirs before
  if (join.warp == 0) {
    for (int rank = join.lane / 4; rank < args.plan.cluster_size; rank += kWarpSize / 4) {
#pragma unroll
      for (int n = 0; n < S::kHeadTiles; ++n) {
        const int place = block.rank * kAllHeads<S> + set_head + n * 8 + join.lane % 4 * 2;
        ptx::store_cluster_x2(
            ptx::cluster_address(part_lse + place * kFloatBytes, rank), lse[n][0], lse[n][1]);
      }
    }
  }
  const auto send = [&](int channel, int head, float x, float y) {
    const int rank = channel * args.plan.cluster_size / S::kValueDim;
    const int place = block.rank * args.channels_per_block + channel % args.channels_per_block;
    const uint32_t address = part_out + (place * kAllHeads<S> + set_head + head) * kFloatBytes;
    ptx::store_cluster_x2(ptx::cluster_address(address, rank), x, y);
  };
#pragma unroll
  for (int i = join.warp; i < S::kFragments; i += kWarpsOfSet<S>) {
    const float4 total = sum_fragment<kWarpsOfSet<S>, S::kFragments>(join, i);
    const FragmentPlace<S> place(i, join.lane);
    if (place.head < num_heads) {
      send(place.channel, place.head, total.x, total.y);
      send(place.channel + 8, place.head, total.z, total.w);
    }
  }
}

// Joins the blocks' parts of this block's channels and stores them.
template <class S>
__device__ __forceinline__ void join_blocks(const PagesKernelArgs& args,
                                            const PagesBlock& block,
                                            const PagesLayout& layout,
                                            const ItemView& heads) {
  const AttendParams& params = args.params;
  const auto* part_out = reinterpret_cast<const float*>(block.stages + layout.part_out);
  const auto* part_lse = reinterpret_cast<const float*>(block.stages + layout.part_lse);
  const int num_values = args.plan.heads.heads_per_item * args.channels_per_block;
  for (int i = static_cast<int>(threadIdx.x); i < num_values; i += kPagesThreads<S>) {
    const int head = i / args.channels_per_block;
    const int channel = i % args.channels_per_block;
    float maximum = -kInfinity;
    for (int rank = 0; rank < args.plan.cluster_size; ++rank) {
      maximum = fmaxf(maximum, part_lse[rank * kAllHeads<S> + head]);
    }
    const float base = maximum == -kInfinity ? 0.0F : maximum;
    float total = 0.0F;
    float sum = 0.0F;
    for (int rank = 0; rank < args.plan.cluster_size; ++rank) {
      const float weight = ptx::approximate_exp2(part_lse[rank * kAllHeads<S> + head] - base);
      const float part = part_out[(rank * args.channels_per_block + channel) * kAllHeads<S> + head];
      total += weight;
      sum += weight == 0.0F ? 0.0F : weight * part;  // what has no weight may be NaN
    }
    const int64_t out_row = heads.row * params.num_query_heads + heads.first_head + head;
    if (params.out != nullptr) {
      store_as(params.out_dtype,
               params.out,
               out_row * S::kValueDim + block.rank * args.channels_per_block + channel,
               total == 0.0F ? 0.0F : sum / total);
    }
    if (block.rank == 0 && channel == 0) {
      params.lse[out_row] = (base + ptx::approximate_log2(total)) * kLn2;
    }
  }
}

// A warp that attends, from its queries to what it sends.
template <class S>
__device__ __forceinline__ void consume_pages(const PagesKernelArgs& args,
                                              const PagesBlock& block,
                                              const PagesLayout& layout,
                                              const ItemView& heads,
                                              int warp,
                                              int lane) {
  constexpr int kSetThreads = kWarpsOfSet<S> * kWarpSize;
  const int set = warp / kWarpsOfSet<S>;
  const int set_warp = warp % kWarpsOfSet<S>;
  const int set_head = set * S::kHeads;
  const int num_heads = min(S::kHeads, args.plan.heads.heads_per_item - set_head);
  const WarpJoin<kWarpsOfSet<S>> join = {
      reinterpret_cast<float4*>(block.stages) + set * kSetThreads * S::kFragments,
      reinterpret_cast<WarpStatistics*>(block.stages + layout.statistics) +
          set * kWarpsOfSet<S> * S::kHeads,
      kConsumerBarrier,
      kConsumerThreads<S>,
      set_warp,
      lane};
  auto* queries = reinterpret_cast<uint32_t*>(block.stages + layout.query +
                                              set * query_bytes<S>(args.softmax.query_terms));
  load_queries<S, kSetThreads>(args.params,
                               args.softmax.query_terms,
                               heads.row,
                               heads.first_head + set_head,
                               num_heads,
                               queries,
                               set_warp * kWarpSize + lane);
  join.sync();
  const ConsumerView view(lane, set_warp % kSetWarps, ptx::shared_address(queries));
  Accumulator<S> sums;
  attend_pages(args, block, view, set_warp / kSetWarps, sums);
  send_part<S>(args, block, layout, sums, join, set_head, num_heads);
}

template <class S>
__global__ void __launch_bounds__(kPagesThreads<S>, kBlocksPerSm<S>)
    attend_pages_kernel(const __grid_constant__ PagesKernelArgs args) {
  extern __shared__ __align__(1024) std::byte shared[];
  const PagesPlan& plan = args.plan;
  const PagesLayout layout = pages_layout<S>(plan.num_stages, args.softmax.query_terms);
  const auto warp = static_cast<int>(threadIdx.x / kWarpSize);
  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  const auto item = static_cast<int64_t>(blockIdx.x / plan.cluster_size);
  PagesBlock block = {};
  block.stages = shared;
  block.entries = reinterpret_cast<PageTokens*>(shared + layout.entries);
  block.full = ptx::shared_address(shared + layout.full);
  block.empty = ptx::shared_address(shared + layout.empty);
  block.rank = static_cast<int>(blockIdx.x % plan.cluster_size);
  block.num_entries =
      static_cast<int>(entries_per_block(args.max_pages - block.rank, plan.cluster_size));
  block.list = item / plan.heads.units_per_list;
  const ItemView heads(args.params, block.list, static_cast<int>(item % plan.heads.units_per_list));
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.num_stages; ++i) {
      ptx::barrier_init(block.full + i * 8, 1);
      ptx::barrier_init(block.empty + i * 8, kConsumerWarps<S>);
    }
    ptx::barrier_init_fence();
    ptx::prefetch_tensor_map(&args.key_pages);
    ptx::prefetch_tensor_map(&args.value_pages);
  }
  __syncthreads();
  ptx::cluster_arrive();
  ptx::wait_for_dependencies();
  ptx::launch_dependents();

  if (warp == 0) {
    produce_pages<S>(args, block, heads, lane);
    ptx::cluster_wait();
  } else {
    consume_pages<S>(args, block, layout, heads, warp - 1, lane);
  }
  ptx::cluster_arrive();  // all parts are sent
  ptx::cluster_wait();
  join_blocks<S>(args, block, layout, heads);
}

// ---- Launch ----

// Stages for all pages of a block, or as many as fit beside those of other blocks.
template <class S>
int choose_stages(const AttendPagesArgs& from, const PagesPlan& plan, int query_terms) {
  constexpr int kReservedBytes = 1024;  // of a block
  const int fixed_bytes = pages_layout<S>(0, query_terms).end;
  const int stage_bytes = pages_layout<S>(1, query_terms).end - fixed_bytes;
  const auto shared_bytes = static_cast<int>(from.shared_memory_per_block);
  const int room =
      from.blocks_per_sm > 1 ? shared_bytes / from.blocks_per_sm - kReservedBytes : shared_bytes;
  const int64_t entries = entries_per_block(from.max_pages, plan.cluster_size);
  const int64_t stages = std::min<int64_t>(entries, decode_stages(room, fixed_bytes, stage_bytes));
  return static_cast<int>(std::max<int64_t>(stages, kMinStages));
}

// Whether all clusters are on the device at once; clusters of one block need not be.
template <class S>
bool clusters_fit(const LaunchShape& shape, int64_t num_items) {
  if (shape.cluster_size == 1) {
    return true;
  }
  int num_clusters = 0;
  const DependentLaunch launch(shape, nullptr);
  const cudaLaunchConfig_t config = launch.independent_config();
  if (cudaOccupancyMaxActiveClusters(&num_clusters, attend_pages_kernel<S>, &config) !=
      cudaSuccess) {
    cudaGetLastError();  // a size that the device does not take is not an error
    return false;
  }
  return num_clusters >= num_items;
}

template <class S>
cudaError_t launch_pages(const AttendPagesArgs& from, PagesKernelArgs& args, cudaStream_t stream) {
  const auto kernel = attend_pages_kernel<S>;
  const DecodeShape decode_shape = decode::decode_shape(from.params, from.row_pages != nullptr);
  const int terms = args.softmax.query_terms;
  LaunchShape shape;
  shape.num_threads = kPagesThreads<S>;
  bool fits = false;
  int limit = std::min(from.max_cluster_size, kMaxClusterSize);
  while (!fits) {
    args.plan = plan_pages(decode_shape, from.max_pages, from.num_sms, limit);
    args.plan.num_stages = choose_stages<S>(from, args.plan, terms);
    limit = args.plan.cluster_size / 2;
    shape.cluster_size = args.plan.cluster_size;
    shape.num_blocks = args.plan.num_items * args.plan.cluster_size;
    shape.shared_bytes = static_cast<size_t>(pages_layout<S>(args.plan.num_stages, terms).end);
    cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error == cudaSuccess) {  // sizes above 8
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error != cudaSuccess) {
      return error;
    }
    fits = clusters_fit<S>(shape, args.plan.num_items);
  }
  args.channels_per_block = S::kValueDim / args.plan.cluster_size;
  return DependentLaunch(shape, stream).run(kernel, args);
}

}  // namespace
}  // namespace decode

const char* attend_pages_declines(const AttendPagesArgs& args) {
  return decode::declines(args.params);
}

cudaError_t launch_attend_pages(const AttendPagesArgs& args, cudaStream_t stream) {
  if (args.params.num_rows == 0) {
    return cudaSuccess;
  }
  const PagedView& kv = args.params.kv;
  decode::PagesKernelArgs kernel = {};
  kernel.params = args.params;
  kernel.row_pages = args.row_pages;
  kernel.page_lists = args.page_lists;
  kernel.max_pages = args.max_pages;
  kernel.softmax = decode::Softmax(args.params);
  cudaError_t error =
      decode::make_map(kv, kv.key_dim, kPageTokens, kv.key_dim / 64, kernel.key_pages);
  if (error == cudaSuccess) {
    error = decode::make_map(kv, kv.value_dim, kPageTokens, kv.value_dim / 64, kernel.value_pages);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const DecodeShape shape = decode::decode_shape(args.params, args.row_pages != nullptr);
  return decode::with_shape(kv, item_heads(shape), [&](auto dims) {
    return decode::launch_pages<decltype(dims)>(args, kernel, stream);
  });
}

#ifdef LONGSPAN_CUDA_SPIN_LIMIT
void report_attend_pages_spin() { ptx::report_spin("attend_pages"); }
#endif

}  // namespace longspan::cuda
