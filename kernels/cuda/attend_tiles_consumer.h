// Attention of many rows on Hopper: a warpgroup of 64 rows. S = Q K^T and O += P V by wgmma, the
// softmax between them in registers.
#pragma once

#include <type_traits>

#include "kernels/cuda/attend_tiles_softmax.h"

namespace longspan::cuda::tiles {

template <class C>
using OutRows = float[C::kOutBlocks][C::kOutBlock / 2];

template <class C>
__device__ __forceinline__ void multiply_keys(float (&s)[C::kStepTokens / 2],
                                              uint64_t query,
                                              uint64_t keys) {
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < C::kKeyDim / 16; ++k) {
    const int plane = k / 4;
    const int column_bytes = (k % 4) * 32;
    ptx::wgmma_m64k16<false>(
        typename C::T{},
        s,
        ptx::wgmma_advance(query, plane * C::kTileRows * kPlaneRowBytes + column_bytes),
        ptx::wgmma_advance(keys, plane * C::kPlaneBytes + column_bytes),
        k > 0);
  }
  ptx::wgmma_commit();
}

template <class C>
__device__ __forceinline__ void multiply_values(OutRows<C>& o,
                                                const uint32_t (&p)[C::kStepTokens / 16][4],
                                                uint64_t values) {
  constexpr int kBlockBytes = C::kOutBlock / kPlaneElements * C::kPlaneBytes;
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < C::kStepTokens / 16; ++k) {
#pragma unroll
    for (int block = 0; block < C::kOutBlocks; ++block) {
      ptx::wgmma_m64k16<true>(
          typename C::T{},
          o[block],
          p[k],
          ptx::wgmma_advance(values, block * kBlockBytes + k * 16 * kPlaneRowBytes),
          true);
    }
  }
  ptx::wgmma_commit();
}

// Where only some of the warps have a new reference, the others pass.
template <class C>
__device__ __forceinline__ void scale_out(OutRows<C>& o, const float (&rescale)[2]) {
  if (!__any_sync(kAllLanes, rescale[0] != 1.0F || rescale[1] != 1.0F)) {
    return;
  }
#pragma unroll
  for (int block = 0; block < C::kOutBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < C::kOutBlock / 2; ++i) {
      o[block][i] *= rescale[(i / 2) % 2];
    }
  }
}

// Named barriers: 0 is the block's.
inline constexpr int kTailBarrier = 1;  // + warpgroup
inline constexpr int kTurnBarrier = 4;  // + warpgroup

// What lies behind the last token may be anything, and 0 times NaN is NaN: zeros instead. Every
// warpgroup writes them, each before its own reads.
template <class C>
__device__ __forceinline__ void clear_tails(uint8_t* values, uint32_t word, int warpgroup) {
  const int thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll
  for (int page = 0; page < C::kStepPages; ++page) {
    const auto tokens = static_cast<int>(tail_of(word, page));
    if (tokens == 0) {
      continue;
    }
    const int chunks = (kPageTokens - tokens) * (kPlaneRowBytes / 16);
    for (int plane = 0; plane < C::kValuePlanes; ++plane) {
      uint8_t* rows =
          values + plane * C::kPlaneBytes + (page * kPageTokens + tokens) * kPlaneRowBytes;
      for (int i = thread; i < chunks; i += kWarpgroupThreads) {
        *reinterpret_cast<uint4*>(rows + i * 16) = uint4{};
      }
    }
  }
  ptx::fence_async_shared();
  ptx::named_barrier_sync(kTailBarrier + warpgroup, kWarpgroupThreads);
}

// Two neighbouring elements of a row of the output.
template <class Out>
__device__ __forceinline__ void store_pair(void* out, int64_t index, float first, float second) {
  if constexpr (std::is_same_v<Out, float>) {
    *reinterpret_cast<float2*>(static_cast<float*>(out) + index) = float2{first, second};
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<Out*>(out) + index) = ptx::pack<Out>(first, second);
  }
}

// This thread's columns of one row.
template <class C, class Out>
__device__ __forceinline__ void store_row(
    void* out, int64_t row_begin, const OutRows<C>& o, int r, float factor) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int block = 0; block < C::kOutBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < C::kOutBlock / 8; ++i) {
      store_pair<Out>(out,
                      row_begin + block * C::kOutBlock + 8 * i + 2 * quad,
                      o[block][4 * i + 2 * r] * factor,
                      o[block][4 * i + 2 * r + 1] * factor);
    }
  }
}

// 0, or NaN if the output of a row is not finite in one of this thread's columns.
template <class C>
__device__ __forceinline__ float check_row(const OutRows<C>& o, int r) {
  float check = 0.0F;
#pragma unroll
  for (int block = 0; block < C::kOutBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < C::kOutBlock / 8; ++i) {
      check = fmaf(o[block][4 * i + 2 * r], 0.0F, check);
      check = fmaf(o[block][4 * i + 2 * r + 1], 0.0F, check);
    }
  }
  return check;
}

template <class C>
__device__ __forceinline__ void store_tile(const KernelParams& kernel,
                                           TileOrder::Item item,
                                           const OutRows<C>& o,
                                           const RowState& state) {
  constexpr float kLn2 = 0.693147180559945F;
  const AttendParams& params = kernel.params;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    float check = check_row<C>(o, r);
    check += __shfl_xor_sync(kAllLanes, check, 1);
    check += __shfl_xor_sync(kAllLanes, check, 2);
    const int row = threadIdx.x / kWarpSize * 16 + threadIdx.x % kWarpSize / 4 + 8 * r;
    const int token = row / kernel.group;
    const int64_t row_token = static_cast<int64_t>(item.tile) * kernel.tokens + token;
    if (token >= kernel.tokens || row_token >= params.num_rows) {
      continue;
    }
    const int64_t out_row = row_token * params.num_query_heads +
                            static_cast<int64_t>(item.kv_head) * kernel.group + row % kernel.group;
    const bool empty = sum == 0.0F;
    if (threadIdx.x % 4 == 0) {
      const float lse =
          (state.reference[r] * kernel.exponent_factor + ptx::approximate_log2(sum)) * kLn2;
      params.lse[out_row] = empty ? -kInfinity : lse;
    }
    if (params.out == nullptr) {
      continue;
    }
    // The weight 0 of a value that is NaN or infinite makes NaN, and only the tile is known to see
    // it. A sum of NaN comes from the row's own logits.
    if (threadIdx.x % 4 == 0 && check != 0.0F && sum == sum) {
      kernel.repairs.rows[atomicAdd(kernel.repairs.count, 1)] = static_cast<int32_t>(out_row);
    }
    const float factor = empty ? 0.0F : 1.0F / sum;
    const int64_t begin = out_row * C::kValueDim;
    if (params.out_dtype == DataType::kFloat32) {
      store_row<C, float>(params.out, begin, o, r, factor);
    } else if (params.out_dtype == DataType::kFloat16) {
      store_row<C, __half>(params.out, begin, o, r, factor);
    } else {
      store_row<C, __nv_bfloat16>(params.out, begin, o, r, factor);
    }
  }
}

template <class C>
class Consumer {
 public:
  __device__ Consumer(const KernelParams& kernel, Shared<C>& shared)
      : kernel_(kernel),
        shared_(shared),
        warpgroup_(C::kWarpgroups == 1 ? 0 : uniform(threadIdx.x / kWarpgroupThreads)) {
    const int row = threadIdx.x / kWarpSize * 16 + threadIdx.x % kWarpSize / 4;
    const int list_rows = kernel.token_lists == 1 ? kernel.group : 1;
    lists_[0] = row / list_rows;
    lists_[1] = (row + 8) / list_rows;
  }

  __device__ void run() {
    if constexpr (C::kTakesTurns) {
      if (warpgroup_ == 0) {  // the first turn
        ptx::named_barrier_arrive(kTurnBarrier, 2 * kWarpgroupThreads);
      }
    }
    for (uint32_t i = 0;; ++i) {
      wait(shared_.item_full[i % 2], (i / 2) & 1);
      const int32_t index = shared_.items[i % 2];
      release(shared_.item_empty[i % 2]);
      if (index < 0) {
        break;
      }
      wait(shared_.query_full, i & 1);
      attend_tile(kernel_.order.item(index));
    }
  }

 private:
  using Scores = float[C::kStepTokens / 2];
  using Weights = uint32_t[C::kStepTokens / 16][4];

  __device__ __forceinline__ void release(const uint64_t& barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) {
      arrive(barrier);
    }
  }

  // The tensor cores go from warpgroup to warpgroup; between turns each has its softmax.
  __device__ __forceinline__ void take_turn() {
    if constexpr (C::kTakesTurns) {
      ptx::named_barrier_sync(kTurnBarrier + warpgroup_, 2 * kWarpgroupThreads);
    }
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (C::kTakesTurns) {
      const int next = warpgroup_ + 1 == C::kWarpgroups ? 0 : warpgroup_ + 1;
      ptx::named_barrier_arrive(kTurnBarrier + next, 2 * kWarpgroupThreads);
    }
  }

  // Descriptors are made anew each time: a register is worth more than the instructions.
  __device__ __forceinline__ uint64_t query() const {
    return ptx::wgmma_descriptor(
        ptx::shared_address(shared_.query) + warpgroup_ * kWarpgroupRows * kPlaneRowBytes, 0);
  }
  __device__ __forceinline__ uint64_t keys_at(int stage) const {
    return ptx::wgmma_descriptor(ptx::shared_address(shared_.keys) + stage * C::kKeyStepBytes, 0);
  }
  __device__ __forceinline__ uint64_t values_at(int stage) const {
    return ptx::wgmma_descriptor(ptx::shared_address(shared_.values) + stage * C::kValueStepBytes,
                                 C::kPlaneBytes);
  }

  __device__ __forceinline__ void go_on() {
    place_ = next_;
    next_.advance();
    wait(shared_.keys_full[place_.stage], place_.phase);
  }

  __device__ __forceinline__ void read_word() {
    word_ = uniform(shared_.notes[place_.stage].word);
    ended_ = end_of(word_) != StepEnd::kMore;
  }

  // `word`: of the step whose values lie at `place`.
  __device__ __forceinline__ void wait_for_values(Place<C::kStages> place, uint32_t word) {
    wait(shared_.values_full[place.stage], place.phase);
    if ((word >> 8) != 0) {
      clear_tails<C>(shared_.values[place.stage], word, warpgroup_);
    }
  }

  // What is to be done with the scores of the step: weights in their place.
  __device__ __forceinline__ void weigh(Scores& s, RowState& state, float (&rescale)[2]) {
    if constexpr (C::kSoftCap) {
      cap_scores(s, kernel_.cap_factor, kernel_.params.soft_cap);
    }
    mask_scores<C>(s, shared_, place_.stage, word_, lists_);
    release(shared_.keys_empty[place_.stage]);
    if (ended_) {
      release(shared_.query_empty);
    }
    softmax_step(s, state, kernel_.exponent_factor, rescale);
  }

  __device__ __forceinline__ void attend_tile(TileOrder::Item item) {
    OutRows<C> o = {};
    RowState state;
    go_on();
    read_word();
    if (end_of(word_) != StepEnd::kEmpty) {
      attend_steps(o, state);
    } else {
      release(shared_.keys_empty[place_.stage]);
      release(shared_.values_empty[place_.stage]);
      release(shared_.query_empty);
    }
    store_tile<C>(kernel_, item, o, state);
  }

  __device__ __forceinline__ void attend_steps(OutRows<C>& o, RowState& state) {
    Scores s;
    Weights p;
    float rescale[2];

    // The first step has no values before it.
    take_turn();
    multiply_keys<C>(s, query(), keys_at(place_.stage));
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(s);
    weigh(s, state, rescale);
    pack_weights<typename C::T>(p, s);

    Place<C::kStages> last = place_;
    uint32_t last_word = word_;
    while (!ended_) {
      go_on();
      // Scores of this step, then values of the last one.
      take_turn();
      multiply_keys<C>(s, query(), keys_at(place_.stage));
      wait_for_values(last, last_word);
      multiply_values<C>(o, p, values_at(last.stage));
      pass_turn();

      read_word();
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(s);
      weigh(s, state, rescale);

      hold_until_weighed(state);
      ptx::wgmma_wait<0>();
      pin_out(o);
      release(shared_.values_empty[last.stage]);
      scale_out<C>(o, rescale);
      pack_weights<typename C::T>(p, s);
      last = place_;
      last_word = word_;
    }

    wait_for_values(last, last_word);
    multiply_values<C>(o, p, values_at(last.stage));
    ptx::wgmma_wait<0>();
    pin_out(o);
    release(shared_.values_empty[last.stage]);
  }

  // The assembler would move the wait for the values up, before the softmax that is to hide them. A
  // store that never happens (sums are not negative), but that depends on every weight, keeps the
  // order.
  __device__ __forceinline__ void hold_until_weighed(const RowState& state) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.lt.f32 p, %1, 0f00000000;\n"
        "@p st.volatile.shared.f32 [%0], %1;\n"
        "}" ::"r"(ptx::shared_address(shared_.columns)),
        "f"(state.sum[0] + state.sum[1])
        : "memory");
  }

  static __device__ __forceinline__ void pin_out(OutRows<C>& o) {
#pragma unroll
    for (int block = 0; block < C::kOutBlocks; ++block) {
      ptx::wgmma_pin(o[block]);
    }
  }

  const KernelParams& kernel_;
  Shared<C>& shared_;
  int warpgroup_;
  int lists_[2];             // of row and row + 8
  Place<C::kStages> place_;  // of the step at hand
  Place<C::kStages> next_;   // of the one behind it
  uint32_t word_ = 0;        // of the step at hand
  bool ended_ = false;       // whether the tile has no step behind it
};

}  // namespace longspan::cuda::tiles
