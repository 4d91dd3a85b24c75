// Device code of attend_decode.cu: joins the parts that an item's blocks have left.
#pragma once

#include <cstdint>

#include "kernels/cuda/attend_decode_kernel.h"
#include "kernels/cuda/convert.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/decode_shape.h"
#include "kernels/cuda/ptx.h"

namespace longspan::cuda::decode {

inline constexpr int kJoinWarps = 4;
inline constexpr int kJoinThreads = kJoinWarps * kWarpSize;

// An output row in the making: what one warp has of it, a lane kValueDim / 32 channels.
template <int kChannels>
struct JoinedRow {
  float maximum = -kInfinity;
  float sum = 0.0F;
  float out[kChannels] = {};

  // Adds kBatch parts at most, the loads of all in flight together.
  template <int kBatch>
  __device__ void add(const float* const (&part_out)[kBatch], const float (&part_lse)[kBatch]) {
    float values[kBatch][kChannels];
    float new_maximum = maximum;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int c = 0; c < kChannels; c += 2) {
        const float2 pair = *reinterpret_cast<const float2*>(part_out[i] + c);
        values[i][c] = pair.x;
        values[i][c + 1] = pair.y;
      }
      new_maximum = fmaxf(new_maximum, part_lse[i]);
    }
    const float base = new_maximum == -kInfinity ? 0.0F : new_maximum;
    const float factor = ptx::approximate_exp2(maximum - base);
    maximum = new_maximum;
    sum *= factor;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      out[c] *= factor;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float weight = ptx::approximate_exp2(part_lse[i] - base);
      sum += weight;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        out[c] += weight == 0.0F ? 0.0F : weight * values[i][c];
      }
    }
  }
};

// A block for each item and head, whose warps take the parts in turns.
template <int kValueDim>
__global__ void __launch_bounds__(kJoinThreads)
    join_parts_kernel(const __grid_constant__ DecodeKernelArgs args) {
  constexpr int kChannels = kValueDim / kWarpSize;
  constexpr int kBatch = 8;
  __shared__ float outs[kJoinWarps][kValueDim];
  __shared__ float maxima[kJoinWarps];
  __shared__ float totals[kJoinWarps];
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const DecodePlan& plan = args.plan;
  const int64_t item_index = blockIdx.x / plan.heads.heads_per_item;
  const auto head = static_cast<int>(blockIdx.x % plan.heads.heads_per_item);
  const DecodeParts parts = args.item_parts[item_index];
  if (parts.num_parts <= 1) {
    return;
  }
  const auto warp = static_cast<int>(threadIdx.x / kWarpSize);
  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  JoinedRow<kChannels> row;
  for (int first = warp; first < parts.num_parts; first += kJoinWarps * kBatch) {
    const float* part_out[kBatch];
    float part_lse[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int part = first + i * kJoinWarps;
      const int block = parts.first_block + min(part, parts.num_parts - 1);
      const int64_t index = part_slot(parts, block) * plan.heads.heads_per_item + head;
      part_lse[i] = part < parts.num_parts ? args.part_lse[index] : -kInfinity;
      part_out[i] = args.part_out + index * kValueDim + lane * kChannels;
    }
    row.add(part_out, part_lse);
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    outs[warp][lane * kChannels + c] = row.out[c];
  }
  if (lane == 0) {
    maxima[warp] = row.maximum;
    totals[warp] = row.sum;
  }
  __syncthreads();

  float maximum = -kInfinity;
  for (int w = 0; w < kJoinWarps; ++w) {
    maximum = fmaxf(maximum, maxima[w]);
  }
  const float base = maximum == -kInfinity ? 0.0F : maximum;
  float weights[kJoinWarps];
  float total = 0.0F;
#pragma unroll
  for (int w = 0; w < kJoinWarps; ++w) {
    weights[w] = ptx::approximate_exp2(maxima[w] - base);
    total += weights[w] * totals[w];
  }
  const ItemView heads(args.params,
                       item_index / plan.heads.units_per_list,
                       static_cast<int>(item_index % plan.heads.units_per_list));
  const AttendParams& params = args.params;
  const int64_t out_row = heads.row * params.num_query_heads + heads.first_head + head;
  if (threadIdx.x == 0) {
    params.lse[out_row] = (base + ptx::approximate_log2(total)) * kLn2;
  }
  for (int c = threadIdx.x; c < kValueDim && params.out != nullptr; c += kJoinThreads) {
    float value = 0.0F;
#pragma unroll
    for (int w = 0; w < kJoinWarps; ++w) {
      value += weights[w] * outs[w][c];
    }
    store_as(params.out_dtype,
             params.out,
             out_row * kValueDim + c,
             total == 0.0F ? 0.0F : value / total);
  }
}

}  // namespace longspan::cuda::decode
