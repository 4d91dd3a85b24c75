// NSA's importance: a block of threads has some tokens with all query heads of one KV head as
// columns, 64 a warpgroup, and goes through the windows, 64 at a time:
//
//   windows x columns   logits, by wgmma on a stage of windows in shared memory
//   p = exp(logit - lse), added up over the heads of a token, in registers
//   sums [token][window] in shared memory, from which a warp computes the importance of the blocks
//   of its tokens and keeps the best (importance_rows.h)
//
// The logits of stage s + 1 are under way while those of stage s are worked on. Where there are few
// tokens, the windows are shared out over several blocks of threads, and the last one of them joins
// what they found.
#include <climits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/convert.h"
#include "kernels/cuda/importance.h"
#include "kernels/cuda/importance_logits.h"
#include "kernels/cuda/importance_rows.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/top_k.h"
#include "kernels/cuda/warp.h"
#include "kernels/page.h"

namespace longspan::cuda {
namespace importance {
namespace {

extern __shared__ __align__(1024) unsigned char shared_memory[];

// Stages whose blocks this share has, of those that a row of the block needs.
struct StageRange {
  int begin;
  int end;
};

__device__ __forceinline__ StageRange init_rows(const ImportanceArgs& args,
                                                const Place& place,
                                                const Overlap& overlap,
                                                int num_tokens,
                                                ImportanceRow* rows) {
  __shared__ int first_block;
  __shared__ int end_block;
  if (threadIdx.x == 0) {
    first_block = INT_MAX;
    end_block = 0;
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i < num_tokens) {
    const int64_t token = place.first_token + i;
    ImportanceRow row = {0, 0, 0, 0, 0, __int_as_float(0x7fffffff)};
    if (token < args.shape.num_rows) {
      row.begin = static_cast<int>(args.candidate_begin[token]);
      row.end = static_cast<int>(args.candidate_end[token]);
      row.k = static_cast<int>(min(args.k[token], args.shape.max_k));
      row.visible = static_cast<int>(args.visible_windows[token]);
    }
    if (row.k <= 0 || row.begin >= row.end) {
      row.end = row.begin;
    } else {
      atomicMin(&first_block, row.begin);
      atomicMax(&end_block, row.end);
    }
    rows[i] = row;
  }
  __syncthreads();
  const int blocks = 1 << overlap.blocks_shift;
  const int begin = first_block == INT_MAX ? 0 : first_block / blocks;
  const int end = (end_block + blocks - 1) / blocks;
  const int num_shares = static_cast<int>(gridDim.y);
  const int share = static_cast<int>(blockIdx.y);
  const int64_t length = max(end - begin, 0);
  return {begin + static_cast<int>(length * share / num_shares),
          begin + static_cast<int>(length * (share + 1) / num_shares)};
}

__device__ __forceinline__ void load_offsets(const ImportanceArgs& args,
                                             const Place& place,
                                             int columns_per_token,
                                             int first_column,
                                             int quad_lane,
                                             ColumnOffsets& offsets) {
  constexpr float kLog2E = 1.44269504088896341F;
  const int group = args.shape.group();
  offsets.all_heads = columns_per_token == group;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int column = first_column + i / 2 * 8 + 2 * quad_lane + i % 2;
    const int64_t token = place.first_token + column / columns_per_token;
    const int head = column % columns_per_token;
    offsets.lse[i] = __int_as_float(0x7f800000);
    if (token < args.shape.num_rows && head < group) {
      offsets.lse[i] =
          kLog2E * args.lse[token * args.shape.num_query_heads + place.kv_head * group + head];
    }
  }
}

// Whether this block is the last one of its group to arrive; it sees what the others wrote.
__device__ __forceinline__ bool is_last(uint32_t* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicInc(ticket, gridDim.y - 1) == gridDim.y - 1;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// Joins into `best` the lists first, first + step, ... of `count`, `lists` apart.
template <int kRegisters>
__device__ __forceinline__ void join_lists(const uint64_t* lists,
                                           size_t apart,
                                           int first,
                                           int step,
                                           int count,
                                           int lane,
                                           uint64_t (&best)[kRegisters]) {
  constexpr int kPlaces = kWarpSize * kRegisters;
  constexpr int kAtOnce = 4 / kRegisters;
  for (int list = first; list < count; list += step * kAtOnce) {
    uint64_t others[kAtOnce][kRegisters];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int own = list + i * step;
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        const int place = kPlaces - 1 - r * kWarpSize - lane;  // ascending
        others[i][r] =
            own < count ? __ldcg(lists + static_cast<size_t>(own) * apart + place) : kNoCandidate;
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      merge_ascending<Code::kShort>(best, others[i], lane);
    }
  }
}

template <int kRegisters>
__device__ __forceinline__ void store_row(const ImportanceArgs& args,
                                          const Place& place,
                                          int token,
                                          int lane,
                                          const uint64_t (&best)[kRegisters]) {
  const int64_t row = place.first_token + token;
  if (row < args.shape.num_rows) {
    const int64_t list = (row * args.shape.num_kv_heads + place.kv_head) * args.shape.max_k;
    store_list(best, lane, args.k[row], args.shape.max_k, args.scores + list, args.ids + list);
  }
}

// The lists of all shares, joined by the last block. `part_lists`: [group][share][token][places];
// `scratch`: [warps][places] of shared memory.
template <int kRegisters>
__device__ void join_shares(const ImportanceArgs& args,
                            const Place& place,
                            int num_tokens,
                            const uint64_t* part_lists,
                            uint64_t* scratch,
                            int lane) {
  constexpr int kPlaces = kWarpSize * kRegisters;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  const auto apart = static_cast<size_t>(num_tokens) * kPlaces;
  for (int token = 0; token < num_tokens && place.first_token + token < args.shape.num_rows;
       ++token) {
    uint64_t best[kRegisters] = {};
    join_lists(part_lists + token * kPlaces,
               apart,
               warp,
               num_warps,
               static_cast<int>(gridDim.y),
               lane,
               best);
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      scratch[warp * kPlaces + r * kWarpSize + lane] = best[r];
    }
    __syncthreads();
    if (warp == 0) {
      for (int other = 1; other < num_warps; ++other) {
        uint64_t ascending[kRegisters];
#pragma unroll
        for (int r = 0; r < kRegisters; ++r) {
          ascending[r] = scratch[other * kPlaces + kPlaces - 1 - r * kWarpSize - lane];
        }
        merge_ascending<Code::kShort>(best, ascending, lane);
      }
      store_row(args, place, token, lane, best);
    }
    __syncthreads();
  }
}

// What a thread scans: stages of windows against the columns of its warpgroup.
struct Scan {
  Place place;
  Overlap overlap;
  StageRange blocks;   // whose blocks are wanted
  StageRange windows;  // that are needed for them
  int columns_per_token;
  int group;        // warpgroup
  int first_token;  // of the warpgroup
  int own_token;    // the first of the warp, and how many
  int own_tokens;
  uint32_t stages;   // shared memory
  uint32_t queries;  // of the warpgroup

  __device__ uint32_t stage(int index) const {
    return stages + static_cast<uint32_t>(index - windows.begin) % kStages * place.operand_bytes();
  }
};

__device__ __forceinline__ void fetch(const ImportanceArgs& args, const Scan& scan, int stage) {
  if (stage < scan.windows.end && int64_t{stage} * kWindows < args.shape.num_windows) {
    fetch_stage(args.pages[stage], scan.place, scan.stage(stage));
  }
  ptx::copy_async_commit();
}

// Adds up the exponentials of a stage and takes its blocks.
template <int kRegisters>
__device__ __forceinline__ void take_stage(const Scan& scan,
                                           const ImportanceRows<kRegisters>& rows,
                                           const ColumnOffsets& offsets,
                                           float scale_log2,
                                           float divisor,
                                           int stage,
                                           Logits& logits) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize % kGroupWarps;
  exponentials(scale_log2, offsets, logits);
  float* const out = rows.sums(scan.first_token) + stage % 2 * kWindows + warp * 16 + lane / 4;
  if (scan.columns_per_token == 16) {
    store_sums<16>(logits, lane % 4, out);
  } else if (scan.columns_per_token == 8) {
    store_sums<8>(logits, lane % 4, out);
  } else {
    store_sums<4>(logits, lane % 4, out);
  }
  ptx::named_barrier_sync(1 + scan.group, kGroupThreads);
  if (stage >= scan.blocks.begin) {
    rows.take_blocks(scan.own_token, scan.own_tokens, stage, scan.overlap, divisor);
  }
}

template <class T, int kTerms, int kPlanes, int kRegisters>
__device__ __forceinline__ void scan_stages(const ImportanceArgs& args,
                                            const Scan& scan,
                                            const ImportanceRows<kRegisters>& rows,
                                            const ColumnOffsets& offsets) {
  constexpr float kLog2E = 1.44269504088896341F;
  const float scale_log2 = args.scale * kLog2E;
  const float divisor = args.shape.mean_of_heads ? static_cast<float>(args.shape.group()) : 1.0F;
  // The logits of a stage while those of the next one are under way.
  const auto work = [&](int stage, Logits& logits, Logits& next) {
    ptx::copy_async_wait<kStages - 2>();
    ptx::fence_async_shared();
    __syncthreads();  // the next stage has arrived for all, and all are done with this one
    fetch(args, scan, stage + kStages);
    // After the last stage the products are nobody's: a branch would serialise them all.
    start_logits<T, kTerms, kPlanes>(scan.stage(stage + 1), scan.queries, next);
    take_stage(scan, rows, offsets, scale_log2, divisor, stage, logits);
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(next);
  };
  Logits logits[2];
  ptx::copy_async_wait<kStages - 1>();
  ptx::fence_async_shared();
  __syncthreads();
  start_logits<T, kTerms, kPlanes>(scan.stage(scan.windows.begin), scan.queries, logits[0]);
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(logits[0]);
#pragma unroll 1
  for (int stage = scan.windows.begin; stage < scan.windows.end; stage += 2) {
    work(stage, logits[0], logits[1]);
    if (stage + 1 < scan.windows.end) {
      work(stage + 1, logits[1], logits[0]);
    }
  }
}

// kTerms: 1, or 3 where they may be needed.
template <class T, int kTerms, int kPlanes, int kRegisters>
__global__ __launch_bounds__(kMaxThreads,
                             1) void importance_kernel(const __grid_constant__ ImportanceArgs args,
                                                       int columns_per_token,
                                                       uint64_t* part_lists,
                                                       uint32_t* tickets) {
  const ImportanceShape& shape = args.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize % kGroupWarps;
  const int num_groups = static_cast<int>(blockDim.x) / kGroupThreads;
  const int group_tokens = kColumns / columns_per_token;
  const int num_tokens = num_groups * group_tokens;

  Scan scan;
  // Causal: the last tokens see most, and go first.
  scan.place = {(gridDim.x - 1 - blockIdx.x) / shape.num_kv_heads * int64_t{num_tokens},
                static_cast<int>(blockIdx.x) % shape.num_kv_heads,
                kPlanes,
                kTerms};
  scan.overlap = {shape.windows_per_block(),
                  shape.windows_before(),
                  __ffs(kWindows / shape.windows_per_block()) - 1};
  scan.columns_per_token = columns_per_token;
  scan.group = static_cast<int>(threadIdx.x) / kGroupThreads;
  scan.first_token = scan.group * group_tokens;
  scan.own_tokens = group_tokens / kGroupWarps;
  scan.own_token = scan.first_token + warp * scan.own_tokens;

  // Shared memory: stages, queries, lists and buffers, sums, rows.
  constexpr uint32_t kOperandBytes = kPlanes * kPlaneBytes;
  unsigned char* const queries = shared_memory + kStages * kOperandBytes;
  unsigned char* const lists = queries + static_cast<uint32_t>(num_groups * kTerms) * kOperandBytes;
  constexpr int kRowPlaces = kWarpSize * kRegisters + kImportanceBuffer;
  auto* const sums = reinterpret_cast<float*>(lists + num_tokens * kRowPlaces * sizeof(uint64_t));
  auto* const states = reinterpret_cast<ImportanceRow*>(sums + num_tokens * kImportanceRingStride);
  const ImportanceRows<kRegisters> rows(states, reinterpret_cast<uint64_t*>(lists), sums, lane);
  scan.stages = ptx::shared_address(shared_memory);
  scan.queries =
      ptx::shared_address(queries) + static_cast<uint32_t>(scan.group * kTerms) * kOperandBytes;

  scan.blocks = init_rows(args, scan.place, scan.overlap, num_tokens, states);
  scan.windows = scan.blocks;
  if (scan.blocks.begin > 0 && scan.overlap.windows_before > 0) {
    --scan.windows.begin;  // windows that reach into the first block
  }
  rows.clear(scan.own_token, scan.own_tokens);
  if (scan.blocks.begin < scan.blocks.end) {
    for (int i = 0; i < kStages; ++i) {
      fetch(args, scan, scan.windows.begin + i);
    }
    const int terms = load_queries<T>(args, scan.place, columns_per_token, queries);
    ColumnOffsets offsets;
    load_offsets(args, scan.place, columns_per_token, scan.group * kColumns, lane % 4, offsets);
    if (kTerms == 1 || terms == 1) {
      scan_stages<T, 1, kPlanes>(args, scan, rows, offsets);
    } else {
      scan_stages<T, kTerms, kPlanes>(args, scan, rows, offsets);
    }
  }

  constexpr int kPlaces = kWarpSize * kRegisters;
  uint64_t* const parts =
      part_lists + static_cast<size_t>(blockIdx.x) * gridDim.y * num_tokens * kPlaces;
  for (int token = scan.own_token; token < scan.own_token + scan.own_tokens; ++token) {
    uint64_t best[kRegisters];
    rows.finish(token, best);
    if (gridDim.y == 1) {
      store_row(args, scan.place, token, lane, best);
    } else {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        parts[(static_cast<size_t>(blockIdx.y) * num_tokens + token) * kPlaces + r * kWarpSize +
              lane] = best[r];
      }
    }
  }
  if (gridDim.y > 1 && is_last(tickets + blockIdx.x)) {
    join_shares<kRegisters>(
        args, scan.place, num_tokens, parts, reinterpret_cast<uint64_t*>(lists), lane);
  }
}

template <class T, int kTerms, int kPlanes, int kRegisters>
cudaError_t launch(const ImportanceArgs& args,
                   const ImportancePlan& plan,
                   std::byte* workspace,
                   uint32_t* tickets,
                   cudaStream_t stream) {
  const auto kernel = importance_kernel<T, kTerms, kPlanes, kRegisters>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(plan.num_groups), static_cast<unsigned>(plan.num_splits));
  config.blockDim = dim3(static_cast<unsigned>(plan.warpgroups * kGroupThreads));
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config,
                            kernel,
                            args,
                            plan.columns_per_token,
                            reinterpret_cast<uint64_t*>(workspace),
                            tickets);
}

template <class T, int kTerms>
cudaError_t launch_shape(const ImportanceArgs& args,
                         const ImportancePlan& plan,
                         std::byte* workspace,
                         uint32_t* tickets,
                         cudaStream_t stream) {
  if (args.shape.dim == 64) {
    return plan.list_registers == 1
               ? launch<T, kTerms, 1, 1>(args, plan, workspace, tickets, stream)
               : launch<T, kTerms, 1, 4>(args, plan, workspace, tickets, stream);
  }
  return plan.list_registers == 1 ? launch<T, kTerms, 2, 1>(args, plan, workspace, tickets, stream)
                                  : launch<T, kTerms, 2, 4>(args, plan, workspace, tickets, stream);
}

}  // namespace
}  // namespace importance

cudaError_t launch_importance(const ImportanceArgs& args,
                              const ImportancePlan& plan,
                              std::byte* workspace,
                              uint32_t* tickets,
                              cudaStream_t stream) {
  if (plan.num_groups == 0 || args.shape.max_k == 0) {
    return cudaSuccess;
  }
  if (args.shape.dtype == DataType::kFloat16) {
    return importance::launch_shape<__half, 1>(args, plan, workspace, tickets, stream);
  }
  return plan.num_terms == 1
             ? importance::launch_shape<__nv_bfloat16, 1>(args, plan, workspace, tickets, stream)
             : importance::launch_shape<__nv_bfloat16, 3>(args, plan, workspace, tickets, stream);
}

}  // namespace longspan::cuda
