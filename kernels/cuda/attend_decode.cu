// Split-KV decode over lists of spans: attend_decode.h. What each block does is decode_schedule.h.
#include <cstdint>

#include "kernels/cuda/attend_decode.h"
#include "kernels/cuda/attend_decode_kernel.h"
#include "kernels/cuda/attend_decode_parts.h"
#include "kernels/cuda/decode_launch.h"
#include "kernels/cuda/decode_lists.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda {
namespace {

using decode::DecodeKernelArgs;
using decode::DependentLaunch;

// ---- Counting the lists, where they are many ----

// A warp a list.
__global__ void count_lists_kernel(const AttendParams params, int32_t* slices) {
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const int64_t list = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t count = decode::count_slices(params, list, lane, kWarpSize);
  if (lane == 0 && list < params.num_rows * params.num_selection_heads) {
    slices[list] = static_cast<int32_t>(count);
  }
}

constexpr int kScanThreads = 1024;

// One block.
__global__ void scan_lists_kernel(const int32_t* slices,
                                  int64_t num_lists,
                                  int overhead,
                                  int64_t* starts) {
  __shared__ int64_t warp_ends[kWarpSize];
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  int64_t base = 0;
  for (int64_t first = 0; first < num_lists; first += kScanThreads) {
    const int64_t list = first + thread;
    const int64_t length = list < num_lists ? item_length(slices[list], overhead) : 0;
    const int64_t in_warp = decode::warp_inclusive_sum(length, lane);
    if (lane == kWarpSize - 1) {
      warp_ends[thread / kWarpSize] = in_warp;
    }
    __syncthreads();
    const int64_t ends = decode::warp_inclusive_sum(warp_ends[lane], lane);
    const int64_t before =
        __shfl_sync(kFullWarp, ends, (thread / kWarpSize + kWarpSize - 1) % kWarpSize);
    if (list < num_lists) {
      starts[list + 1] = base + in_warp + (thread < kWarpSize ? 0 : before);
    }
    base += __shfl_sync(kFullWarp, ends, kWarpSize - 1);
    __syncthreads();
  }
  if (thread == 0) {
    starts[0] = 0;
  }
}

// ---- Launch ----

// What a launch takes from the workspace.
struct WorkspaceLayout {
  size_t item_parts = 0;
  size_t part_lse = 0;
  size_t part_out = 0;
  size_t list_starts = 0;
  size_t list_slices = 0;
  size_t end = 0;
};

DecodePlan make_plan(const DecodeArgs& args) {
  return plan_decode(decode::decode_shape(args.params, args.row_pages != nullptr), args.num_sms);
}

int64_t num_lists(const AttendParams& params) {
  return params.num_rows * params.num_selection_heads;
}

WorkspaceLayout workspace_layout(const DecodeArgs& args, const DecodePlan& plan) {
  const auto lists = static_cast<size_t>(num_lists(args.params));
  const auto items = lists * static_cast<size_t>(plan.heads.units_per_list);
  const auto part_rows = static_cast<size_t>(2 * plan.num_blocks * plan.heads.heads_per_item);
  WorkspaceLayout layout;
  const auto take = [&](size_t bytes) {
    const size_t begin = layout.end;
    layout.end += (bytes + 15) / 16 * 16;
    return begin;
  };
  layout.item_parts = take(items * sizeof(DecodeParts));
  layout.part_lse = take(part_rows * sizeof(float));
  layout.part_out = take(part_rows * static_cast<size_t>(args.params.kv.value_dim) * sizeof(float));
  if (!plan.plan_in_kernel) {
    layout.list_starts = take((lists + 1) * sizeof(int64_t));
    layout.list_slices = take(lists * sizeof(int32_t));
  }
  return layout;
}

cudaError_t launch_list_kernels(const DecodeKernelArgs& args,
                                int32_t* slices,
                                int64_t* starts,
                                cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t lists = num_lists(args.params);
  const int64_t blocks = (lists * kWarpSize + kThreads - 1) / kThreads;
  const cudaError_t error =
      DependentLaunch({blocks, kThreads}, stream).run(count_lists_kernel, args.params, slices);
  if (error != cudaSuccess) {
    return error;
  }
  return DependentLaunch({1, kScanThreads}, stream)
      .run(scan_lists_kernel, slices, lists, args.plan.overhead, starts);
}

template <class S>
cudaError_t launch_kernels(size_t shared_memory, DecodeKernelArgs& args, cudaStream_t stream) {
  DecodePlan& plan = args.plan;
  const int terms = args.softmax.query_terms;
  const int fixed_bytes = decode::decode_layout<S>(0, terms).end;
  const int stage_bytes = decode::decode_layout<S>(1, terms).end - fixed_bytes;
  plan.num_stages = decode_stages(static_cast<int>(shared_memory), fixed_bytes, stage_bytes);
  if (plan.num_stages < 2) {
    return cudaErrorInvalidConfiguration;
  }
  const int shared_bytes = decode::decode_layout<S>(plan.num_stages, terms).end;
  const auto kernel = decode::attend_decode_kernel<S>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  error =
      DependentLaunch(
          {plan.num_blocks, decode::kDecodeThreads<S>, static_cast<size_t>(shared_bytes)}, stream)
          .run(kernel, args);
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t items = num_lists(args.params) * plan.heads.units_per_list;
  return DependentLaunch({items * plan.heads.heads_per_item, decode::kJoinThreads}, stream)
      .run(decode::join_parts_kernel<S::kValueDim>, args);
}

cudaError_t make_maps(const PagedView& kv, DecodeKernelArgs& args) {
  using decode::make_map;
  cudaError_t error = make_map(kv, kv.key_dim, kPageTokens, kv.key_dim / 64, args.key_pages);
  if (error == cudaSuccess) {
    error = make_map(kv, kv.value_dim, kPageTokens, kv.value_dim / 64, args.value_pages);
  }
  if (error == cudaSuccess) {
    error = make_map(kv, kv.key_dim, kSliceTokens, 1, args.key_slices);
  }
  if (error == cudaSuccess) {
    error = make_map(kv, kv.value_dim, kSliceTokens, 1, args.value_slices);
  }
  return error;
}

// All of the kernels' arguments but the maps, the lists and the number of stages.
DecodeKernelArgs kernel_args(const DecodeArgs& from, const WorkspaceLayout& layout) {
  DecodeKernelArgs args = {};
  args.params = from.params;
  args.row_pages = from.row_pages;
  args.plan = make_plan(from);
  args.softmax = decode::Softmax(from.params);
  args.item_parts = reinterpret_cast<DecodeParts*>(from.workspace + layout.item_parts);
  args.part_lse = reinterpret_cast<float*>(from.workspace + layout.part_lse);
  args.part_out = reinterpret_cast<float*>(from.workspace + layout.part_out);
  return args;
}

}  // namespace

const char* decode_declines(const DecodeArgs& args) { return decode::declines(args.params); }

size_t decode_workspace_bytes(const DecodeArgs& args) {
  return workspace_layout(args, make_plan(args)).end;
}

cudaError_t launch_attend_decode(const DecodeArgs& args, cudaStream_t stream) {
  if (args.params.num_rows == 0) {
    return cudaSuccess;
  }
  const WorkspaceLayout layout = workspace_layout(args, make_plan(args));
  DecodeKernelArgs kernel = kernel_args(args, layout);
  cudaError_t error = make_maps(args.params.kv, kernel);
  if (error != cudaSuccess) {
    return error;
  }
  if (!kernel.plan.plan_in_kernel) {
    auto* starts = reinterpret_cast<int64_t*>(args.workspace + layout.list_starts);
    auto* slices = reinterpret_cast<int32_t*>(args.workspace + layout.list_slices);
    error = launch_list_kernels(kernel, slices, starts, stream);
    if (error != cudaSuccess) {
      return error;
    }
    kernel.list_starts = starts;
    kernel.list_slices = slices;
  }
  return decode::with_shape(args.params.kv, kernel.plan.heads, [&](auto shape) {
    return launch_kernels<decltype(shape)>(args.shared_memory_per_block, kernel, stream);
  });
}

#ifdef LONGSPAN_CUDA_SPIN_LIMIT
void report_decode_spin() { ptx::report_spin("attend_decode"); }
#endif

}  // namespace longspan::cuda
