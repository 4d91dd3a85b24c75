// Attention of many rows on Hopper. One kernel for dense and selected attention: a tile of 64, 128
// or 192 rows (tokens times the query heads of one KV head, tiles.h) goes through the union of the
// pages that its rows see, in ascending order, and masks what a row does not see.
//
// A block of threads is
//   1 to 3 consumer warpgroups  64 rows each (attend_tiles_consumer.h);
//   a lister warp               deals out tiles, merges the span lists of a tile into pages, writes
//                               what is masked and starts the TMA copies of keys and values;
//   a query warp                copies the queries of the next tile (attend_tiles_lister.h).
// Keys and values go through a ring of stages (attend_tiles_layout.h), a step of 1 or 2 pages each;
// the lists need no memory and no kernel of their own. All tiles use the same ring, so that copies
// of the next tile start before the last one is done.
//
// A value that is not finite makes the output of every row of its tile NaN: those rows are listed,
// and attend_repair.cu makes them again.
//
// In one consumer the scores of step j + 1 are under way while step j is still multiplied with
// values; several consumers take turns on the tensor cores, so that the softmax of one hides behind
// the products of the others.
#include <algorithm>

#include "kernels/cuda/attend_tiles.h"
#include "kernels/cuda/attend_tiles_consumer.h"
#include "kernels/cuda/attend_tiles_lister.h"
#include "kernels/cuda/tensor_map.h"

namespace longspan::cuda {
namespace tiles {
namespace {

constexpr int kCounters = 2;  // of scratch memory: items dealt out, rows to repair

template <class C>
__device__ void init_barriers(Shared<C>& shared) {
  const auto init = [](uint64_t& barrier, uint32_t arrivals) {
    ptx::barrier_init(ptx::shared_address(&barrier), arrivals);
  };
  init(shared.query_full, 1);
  init(shared.query_empty, C::kConsumerWarps);
  for (int i = 0; i < C::kStages; ++i) {
    init(shared.keys_full[i], 1);
    init(shared.values_full[i], 1);
    init(shared.keys_empty[i], C::kConsumerWarps);
    init(shared.values_empty[i], C::kConsumerWarps);
  }
  for (int i = 0; i < 2; ++i) {
    init(shared.item_full[i], 1);
    init(shared.item_empty[i], C::kConsumerWarps + 1);
  }
  ptx::barrier_init_fence();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    attend_tiles_kernel(const __grid_constant__ KernelParams kernel,
                        const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<C>*>(shared_bytes);
  if (threadIdx.x == 0) {
    init_barriers(shared);
    ptx::prefetch_tensor_map(&maps.query);
    ptx::prefetch_tensor_map(&maps.keys);
    ptx::prefetch_tensor_map(&maps.values);
  }
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (warp < C::kConsumerWarps) {
    if constexpr (C::kLarge) {
      ptx::increase_registers<C::kConsumerRegisters>();
    }
    Consumer<C>(kernel, shared).run();
  } else {
    if constexpr (C::kLarge) {
      ptx::decrease_registers<C::kListerRegisters>();
    }
    if (warp == C::kConsumerWarps) {
      Lister<C>(kernel, maps, shared).run();
    } else if (warp == C::kConsumerWarps + 1) {
      copy_queries<C>(kernel, maps.query, shared);
    }
  }
}

template <class C>
cudaError_t make_maps(const AttendParams& params, const KernelParams& kernel, TensorMaps& maps) {
  const PagedView& kv = params.kv;
  const cudaError_t keys = make_page_map(
      &maps.keys, kv.arena, kv.arena_bytes, kv.dtype, C::kKeyDim, kPageTokens, /*box_planes=*/1);
  const cudaError_t values =
      make_page_map(&maps.values, kv.arena, kv.arena_bytes, kv.dtype, C::kValueDim, kPageTokens, 1);
  QueryBox box;
  box.heads = kernel.group;
  box.tokens = kernel.box_tokens;
  // With row_query it is not known here how many there are.
  const int64_t num_queries = params.row_query == nullptr ? params.num_rows : 0;
  const cudaError_t query = make_query_map(
      &maps.query, params.query, num_queries, params.num_query_heads, kv.dtype, C::kKeyDim, box);
  return keys != cudaSuccess ? keys : values != cudaSuccess ? values : query;
}

template <class C>
cudaError_t launch(const AttendTilesArgs& args, const KernelParams& kernel, cudaStream_t stream) {
  static_assert(sizeof(Shared<C>) <= C::kSharedBytes);
  if (kernel.tokens * kernel.token_lists > C::kMaxLists) {
    return cudaErrorNotSupported;
  }
  TensorMaps maps;
  cudaError_t error = make_maps<C>(args.params, kernel, maps);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(
        attend_tiles_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<C>));
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(attend_tiles_kernel<C>,
                                 cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(args.scratch, 0, kCounters * sizeof(int32_t), stream);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int grid = std::min(kernel.order.num_items(), args.num_sms * C::kBlocksPerSm);
  attend_tiles_kernel<C><<<grid, C::kThreads, sizeof(Shared<C>), stream>>>(kernel, maps);
  error = cudaGetLastError();
#ifdef LONGSPAN_CUDA_SPIN_LIMIT
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capture);
  if (capture == cudaStreamCaptureStatusNone) {
    ptx::report_spin("attend_tiles");
  }
#endif
  if (error != cudaSuccess || args.params.out == nullptr) {
    return error;
  }
  return launch_attend_repair(args.params, kernel.repairs, args.num_sms, stream);
}

// Calls `function` with the Tiling that serves the arguments.
template <class T, int kKeyDim, int kValueDim, int kTileRows, class Function>
cudaError_t with_cap(const AttendTilesArgs& args, const Function& function) {
  return args.params.soft_cap > 0.0F ? function(Tiling<T, kKeyDim, kValueDim, kTileRows, true>{})
                                     : function(Tiling<T, kKeyDim, kValueDim, kTileRows, false>{});
}

template <class T, int kKeyDim, int kValueDim, class Function>
cudaError_t with_rows(const AttendTilesArgs& args, const Function& function) {
  if (args.tile_rows == 192) {
    if constexpr (kKeyDim == 64) {
      return with_cap<T, kKeyDim, kValueDim, 192>(args, function);
    }
    return cudaErrorNotSupported;
  }
  return args.tile_rows == 128 ? with_cap<T, kKeyDim, kValueDim, 128>(args, function)
                               : with_cap<T, kKeyDim, kValueDim, 64>(args, function);
}

template <class T, class Function>
cudaError_t with_dims(const AttendTilesArgs& args, const Function& function) {
  const PagedView& kv = args.params.kv;
  if (kv.key_dim == 64 && kv.value_dim == 64) {
    return with_rows<T, 64, 64>(args, function);
  }
  if (kv.key_dim == 128 && kv.value_dim == 128) {
    return with_rows<T, 128, 128>(args, function);
  }
  if (kv.key_dim == 192 && kv.value_dim == 128) {
    return with_rows<T, 192, 128>(args, function);
  }
  if (kv.key_dim == 256 && kv.value_dim == 256) {
    return with_rows<T, 256, 256>(args, function);
  }
  return cudaErrorNotSupported;
}

KernelParams make_kernel_params(const AttendTilesArgs& args) {
  constexpr float kLog2E = 1.44269504088896F;
  const AttendParams& params = args.params;
  KernelParams kernel = {};
  kernel.params = params;
  kernel.next_item = args.scratch;
  kernel.repairs = {args.scratch + 1, args.scratch + kCounters};
  kernel.group = params.num_query_heads / params.kv.num_kv_heads;
  kernel.tokens = args.tile_rows / kernel.group;
  kernel.box_tokens = params.row_query == nullptr ? kernel.tokens : 1;
  const bool head_lists = params.num_selection_heads > params.kv.num_kv_heads;
  kernel.token_lists = head_lists ? kernel.group : 1;
  kernel.order.num_tiles =
      static_cast<int32_t>((params.num_rows + kernel.tokens - 1) / kernel.tokens);
  kernel.order.num_kv_heads = params.kv.num_kv_heads;
  kernel.order.section_heads = args.section_heads;
  const bool cap = params.soft_cap > 0.0F;
  kernel.exponent_factor = cap ? kLog2E : params.scale * kLog2E;
  kernel.cap_factor = cap ? 2.0F * kLog2E * params.scale / params.soft_cap : 0.0F;
  return kernel;
}

}  // namespace
}  // namespace tiles

bool attend_tiles_supports(const AttendParams& params) {
  const PagedView& kv = params.kv;
  const int key = kv.key_dim;
  const int value = kv.value_dim;
  const bool dims =
      (key == value && (key == 64 || key == 128 || key == 256)) || (key == 192 && value == 128);
  const int group = params.num_query_heads / kv.num_kv_heads;
  const int lists = params.num_selection_heads;
  constexpr int64_t kMaxTokens = INT32_MAX - kPageTokens;
  constexpr int64_t kMaxItems = INT32_MAX / 2;
  return dims && kv.dtype != DataType::kFloat32 && kv.arena != nullptr && group <= 64 &&
         params.num_query_heads == group * kv.num_kv_heads &&
         (lists == 1 || lists == kv.num_kv_heads || lists == params.num_query_heads) &&
         params.scale > 0.0F && params.scale < tiles::kInfinity && kv.num_entries < kMaxTokens &&
         params.num_rows * kv.num_kv_heads < kMaxItems &&
         params.num_rows * params.num_query_heads <= INT32_MAX &&
         kv.arena_bytes / (static_cast<size_t>(std::min(key, value)) * 2) <= INT32_MAX;
}

int64_t attend_tiles_scratch(const AttendParams& params) {
  const int64_t rows = params.out == nullptr ? 0 : params.num_rows * params.num_query_heads;
  return tiles::kCounters + rows;
}

cudaError_t launch_attend_tiles(const AttendTilesArgs& args, cudaStream_t stream) {
  if (args.params.num_rows == 0) {
    return cudaSuccess;
  }
  const tiles::KernelParams kernel = tiles::make_kernel_params(args);
  const auto run = [&]<class C>(C) { return tiles::launch<C>(args, kernel, stream); };
  return args.params.kv.dtype == DataType::kFloat16 ? tiles::with_dims<__half>(args, run)
                                                    : tiles::with_dims<__nv_bfloat16>(args, run);
}

}  // namespace longspan::cuda
