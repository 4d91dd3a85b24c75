// The sparse decode step: sparse_decode.h.
//
// A cluster of up to 16 blocks has a list (of a row, usually that of a KV head) from its summaries
// to the output, so that nothing goes through global memory but the inputs and the results. Each
// block streams its share of the summaries through a ring in shared memory (sparse_search.h); the
// best k are agreed on through distributed shared memory (sparse_select.h); then the ring takes in
// the block's share of the pages, and the outputs are joined across the cluster (sparse_attend.h).
//
// Blocks of a cluster meet three times: when all have begun, when the survivors have been read, and
// when the parts of the output have been sent. The first two are waited for long after. Maxima and
// survivors come in the background, and barriers count their bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/sparse_attend.h"
#include "kernels/cuda/sparse_block.h"
#include "kernels/cuda/sparse_decode.h"
#include "kernels/cuda/sparse_search.h"
#include "kernels/cuda/sparse_select.h"
#include "kernels/cuda/tensor_map.h"

namespace longspan::cuda {
namespace sparse {
namespace {

// Writes a candidate to the results of the search, and what no candidate is left for.
__device__ __forceinline__ void store_result(const KernelArgs& args,
                                             const Unit& unit,
                                             int rank,
                                             uint64_t candidate) {
  const SearchShape& shape = args.step.shape.search;
  if (args.step.search.ids == nullptr) {
    return;
  }
  const int64_t lists = static_cast<int64_t>(shape.num_kv_heads) * shape.lists();
  const int64_t index = (unit.row * lists + unit.list) * shape.max_k + rank;
  const bool used = candidate != kNoCandidate;
  args.step.search.scores[index] = used ? candidate_score(candidate) : -kInfinity;
  args.step.search.ids[index] = used ? static_cast<int64_t>(candidate_id(candidate)) : -1;
}

// The forced pages that a block attends to are its first items, known before any score. By one
// warp.
__device__ __forceinline__ void place_forced(const KernelArgs& args,
                                             const Memory& memory,
                                             const Unit& unit,
                                             const Forced& forced,
                                             int lane) {
  for (int i = unit.rank + lane * unit.size; i < forced.count(); i += kWarpSize * unit.size) {
    const int page = forced.page(i);
    memory.items()[unit.place(i)] = {args.step.kv.pages[page], forced.tokens(page)};
  }
  __syncwarp();
}

template <int kDim>
__device__ __forceinline__ void copy_forced(const KernelArgs& args,
                                            const Memory& memory,
                                            const Unit& unit,
                                            const Forced& forced,
                                            int lane) {
  if (lane < args.plan.num_slots && unit.rank + lane * unit.size < forced.count()) {
    start_item<kDim>(args, memory, unit, lane, memory.items()[lane]);
  }
}

// Attends to the block's items and joins the outputs of the cluster. All threads.
template <class S>
__device__ __forceinline__ void attend(const KernelArgs& args,
                                       const Memory& memory,
                                       const Unit& unit,
                                       int num_items,
                                       int warp,
                                       int lane) {
  if (warp >= kSparseWorkerWarps) {
    if (warp == kCopyWarp) {
      copy_items<S::kDim>(args, memory, unit, num_items, lane);
      __syncwarp();
    }
    ptx::cluster_wait();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    return;
  }
  Attention<S> attention(args, memory, num_items, warp, lane);
  attention.run();
  attention.store_statistics();
  ptx::named_barrier_sync(kWorkerBarrier, kWorkerThreads);
  ptx::cluster_wait();  // no block reads its survivors any more
  send_parts(memory, unit, attention, warp, lane);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  weigh_parts<S>(args, memory, unit, warp, lane);
  ptx::named_barrier_sync(kWorkerBarrier, kWorkerThreads);
  join_parts<S>(args, memory, unit, warp, lane);
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_decode_kernel(const __grid_constant__ KernelArgs args) {
  using T = typename S::Element;
  constexpr int kDim = S::kDim;
  const Memory memory = block_memory(args);
  const Unit unit(args);
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  State& state = memory.state();
  const SearchTopkArgs& search = args.step.search;
  const bool attends = args.step.shape.attends;

  if (warp == kCopyWarp && lane == 0) {
    init_barriers(args, memory);
    if (attends) {
      ptx::prefetch_tensor_map(&args.page_map);
    }
  }
  if (warp == kWatchWarp && lane == 0) {
    state.num_survivors = 0;
  }
  ptx::wait_for_dependencies();
  ptx::launch_dependents();

  // The first summaries are on their way before anything else. Their pages are asked for together
  // with the limits: candidates mostly begin in page 0.
  const std::byte* guessed_page = nullptr;
  if (warp == kCopyWarp) {
    const int64_t guess = unit.rank + lane * unit.size;
    guessed_page = guess * kPageTokens < search.shape.num_entries ? search.pages[guess] : nullptr;
  }
  const auto begin = static_cast<int>(search.candidate_begin[unit.row]);
  const auto end = static_cast<int>(search.candidate_end[unit.row]);
  const Pages pages(unit, begin, end);
  TileCopier<kDim> copier(args, memory, unit, pages, lane);
  if (warp == kCopyWarp) {
    __syncwarp();
    copier.guess(guessed_page, 0);
    copier.copy(min(pages.count, args.plan.num_stages));
  } else if (warp == kWatchWarp) {
    if (lane == 0) {
      state.begin = begin;
      state.end = end;
      state.k = static_cast<int>(min(search.k[unit.row], args.step.shape.search.max_k));
      state.num_tokens = attends ? args.step.num_tokens[unit.row] : 0;
    }
  } else {
    load_search_query(args, memory, unit);
    if (attends) {
      load_attention_query<S>(args, memory, unit);
    }
  }
  __syncthreads();

  const Forced forced(args.step.shape.forced, state.num_tokens);
  if (warp < kSparseWorkerWarps) {
    float vector[8];
    make_vector(args, memory, unit, lane % TileRows<kDim>::kLanesPerRow, vector);
    ptx::cluster_arrive_relaxed();
    score_tiles<T, kDim>(args, memory, unit, pages, vector, warp, lane);
  } else if (warp == kCopyWarp) {
    ptx::cluster_arrive_relaxed();
    if (attends) {
      place_forced(args, memory, unit, forced, lane);
    }
    copier.copy(pages.count);
    ptx::cluster_wait();
  } else {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
    watch_maxima(args, memory, lane);
  }
  __syncthreads();

  // The ring is free: forced pages come in while the others are chosen.
  if (attends && warp == kCopyWarp) {
    copy_forced<kDim>(args, memory, unit, forced, lane);
  }
  exchange_survivors(args, memory, unit, pages, static_cast<uint64_t>(state.threshold) << 32, 0);
  int total = 0;
  if (!survivors_fit(args, unit, state.counts, lane, total)) {
    refine_survivors(args);
  }
  const int num_forced = attends ? forced.count() : 0;
  total = rank_survivors(
      args,
      memory,
      unit,
      [&](uint64_t candidate) {
        return attends ? args.step.kv.pages[candidate_id(candidate)] : nullptr;
      },
      [&](int rank, uint64_t candidate, const std::byte* page) {
        const auto id = static_cast<int>(candidate_id(candidate));
        if (unit.owns(rank)) {
          store_result(args, unit, rank, candidate);
        }
        const int forced_index = attends ? forced.index(id) : -1;
        if (forced_index >= 0 && unit.owns(forced_index)) {
          memory.items()[unit.place(forced_index)].tokens = forced.visible(id);
        }
        const int index = num_forced + rank;
        if (attends && unit.owns(index)) {
          const uint64_t tokens = forced_index >= 0 ? 0 : forced.visible(id);
          const int item = unit.place(index);
          memory.items()[item] = {page, tokens};
          if (item < args.plan.num_slots) {
            start_item<kDim>(args, memory, unit, item, {page, tokens});
          }
        }
      });
  const int found = min(total, state.k);
  if (unit.rank == 0) {
    const auto max_k = static_cast<int>(args.step.shape.search.max_k);
    for (int rank = found + thread; rank < max_k; rank += kThreads) {
      store_result(args, unit, rank, kNoCandidate);
    }
  }
  if (!attends) {
    ptx::cluster_arrive_relaxed();  // a block stays until what it sent has come
    ptx::cluster_wait();
    return;
  }
  __syncthreads();
  ptx::cluster_arrive_relaxed();
  attend<S>(args, memory, unit, unit.share(num_forced + found), warp, lane);
}

template <class S>
cudaError_t launch(const KernelArgs& args, cudaStream_t stream) {
  const auto kernel = sparse_decode_kernel<S>;
  cudaError_t error = cudaFuncSetAttribute(kernel,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(args.plan.shared_bytes));
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(args.plan.cluster_size);
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.plan.num_lists * args.plan.cluster_size));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = args.plan.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <class T>
cudaError_t launch_type(const KernelArgs& args, cudaStream_t stream) {
  if (args.step.shape.search.dim == 64) {
    return args.plan.head_tiles == 1 ? launch<AttendShape<T, 64, 1>>(args, stream)
                                     : launch<AttendShape<T, 64, 2>>(args, stream);
  }
  return args.plan.head_tiles == 1 ? launch<AttendShape<T, 128, 1>>(args, stream)
                                   : launch<AttendShape<T, 128, 2>>(args, stream);
}

}  // namespace
}  // namespace sparse

int sparse_max_cluster_size() {
  using Shape = sparse::AttendShape<__nv_bfloat16, 128, 1>;
  const auto kernel = sparse::sparse_decode_kernel<Shape>;
  constexpr int kSharedBytes = 200 * 1024;  // no more than one block an SM
  constexpr int kClusters = 8;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes) !=
          cudaSuccess ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
          cudaSuccess) {
    return 0;
  }
  for (int size = kSparseMaxCluster; size >= 2; size /= 2) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(size);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(size * kClusters));
    config.blockDim = dim3(sparse::kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess &&
        clusters >= kClusters) {
      return size;
    }
  }
  return 0;
}

cudaError_t launch_sparse_decode(const SparseDecodeArgs& args,
                                 const SparsePlan& plan,
                                 cudaStream_t stream) {
  if (plan.num_lists == 0) {
    return cudaSuccess;
  }
  sparse::KernelArgs kernel = {};
  kernel.step = args;
  kernel.step.search.shape = args.shape.search;
  kernel.plan = plan;
  kernel.soft_cap = args.soft_cap > 0.0F ? args.soft_cap * sparse::kLog2E : 0.0F;
  kernel.logit_scale = args.soft_cap > 0.0F ? args.scale / args.soft_cap * 2.0F * sparse::kLog2E
                                            : args.scale * sparse::kLog2E;
  if (args.shape.attends) {
    const int dim = args.shape.search.dim;
    const cudaError_t error = make_page_map(&kernel.page_map,
                                            args.kv.arena,
                                            args.kv.arena_bytes,
                                            args.kv.dtype,
                                            dim,
                                            kPageTokens,
                                            dim / 64);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return args.shape.search.dtype == DataType::kFloat16
             ? sparse::launch_type<__half>(kernel, stream)
             : sparse::launch_type<__nv_bfloat16>(kernel, stream);
}

#ifdef LONGSPAN_CUDA_SPIN_LIMIT
void report_sparse_spin() { ptx::report_spin("sparse_decode"); }
#endif

}  // namespace longspan::cuda
