// Device code of the sparse decode step: attention of one list's heads over the block's pages.
//
// Two pages at a time, eight slices of 16 tokens. First a warp has a slice: tokens are the rows of
// the tensor core's tiles, heads the columns. With the maxima of all slices the weights are on one
// scale, and go through shared memory to warps that have 16 channels each, so that no sums of
// outputs have to be joined within the block.
#pragma once

#include "kernels/cuda/sparse_block.h"

namespace longspan::cuda::sparse {

inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;
inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr int kSliceTokens = 16;
inline constexpr int kSlicesPerPage = kPageTokens / kSliceTokens;
inline constexpr int kBatchPages = kSparseBatchSlices / kSlicesPerPage;

template <class T, int kDimension, int kNumHeadTiles>
struct AttendShape {
  using Element = T;
  static constexpr int kDim = kDimension;
  static constexpr int kHeadTiles = kNumHeadTiles;
  static constexpr int kTileBytes = kPageTokens * kDim * 2;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kChannelTiles = kDim / 16;
  // Warps with the same channels: each has every kParts-th slice.
  static constexpr int kParts = kSparseWorkerWarps / kChannelTiles;
  static_assert(kSparseBatchSlices * kHeadTiles <= kSparseWorkerWarps);
};

// Two neighbouring elements of a query as one register of a fragment. Of an fp32 query term 1 is
// what term 0 leaves over.
template <class T>
__device__ __forceinline__ uint32_t query_pair(float2 pair, int term) {
  if (term == 1) {
    const float2 rounded = {to_float(from_float<T>(pair.x)), to_float(from_float<T>(pair.y))};
    pair.x = is_finite(rounded.x) ? pair.x - rounded.x : 0.0F;
    pair.y = is_finite(rounded.y) ? pair.y - rounded.y : 0.0F;
  }
  return ptx::pack<T>(pair.x, pair.y);
}

// The queries of the list's heads as fragments; heads that there are not are zero. By the workers.
template <class S>
__device__ __forceinline__ void load_attention_query(const KernelArgs& args,
                                                     const Memory& memory,
                                                     const Unit& unit) {
  const SearchShape& shape = args.step.shape.search;
  auto* query = reinterpret_cast<uint2*>(memory.base + memory.layout.query);
  constexpr int kFragments = S::kHeadTiles * S::kSteps;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < args.plan.query_terms * kFragments * kWarpSize;
       i += kWorkerThreads) {
    const int lane = i % kWarpSize;
    const int fragment = i / kWarpSize % kFragments;
    const int term = i / kWarpSize / kFragments;
    const int head = fragment / S::kSteps * 8 + lane / 4;
    const int64_t index = (unit.row * shape.num_query_heads + unit.first_head + head) * S::kDim +
                          fragment % S::kSteps * 16 + lane % 4 * 2;
    uint2 pairs = {0, 0};
    if (head < unit.num_heads && args.plan.query_terms == 1) {
      const auto* words = static_cast<const uint32_t*>(args.step.query) + index / 2;
      pairs = {words[0], words[4]};
    } else if (head < unit.num_heads) {
      const auto* floats = static_cast<const float2*>(args.step.query) + index / 2;
      const float2 low = floats[0];
      const float2 high = floats[4];
      pairs = {query_pair<typename S::Element>(low, term),
               query_pair<typename S::Element>(high, term)};
    }
    query[i] = pairs;
  }
}

// The address of 16 columns further on, `step` times: the chunks of a row are exchanged within
// their plane.
__device__ __forceinline__ uint32_t column_step(uint32_t tile, uint32_t offset, int step) {
  return tile + (offset ^ (step % 4 * 32)) + step / 4 * kPlaneBytes;
}

// A warp's attention over the items of the block.
template <class S>
class Attention {
 public:
  __device__ Attention(
      const KernelArgs& args, const Memory& memory, int num_items, int warp, int lane)
      : args_(args), memory_(memory), num_items_(num_items), warp_(warp), lane_(lane) {
    // ldmatrix gives matrix lane / 8 its row lane % 8. A fragment of keys has tokens 0 to 7, then 8
    // to 15, of one chunk, then of the next; one of values, read transposed, two chunks of tokens 0
    // to 7, then of 8 to 15. The swizzle exchanges the chunks of a row by its number.
    const int matrix = lane / 8;
    const int row = lane % 8;
    key_ =
        static_cast<uint32_t>((matrix % 2 * 8 + row) * kPlaneRowBytes + ((matrix / 2) ^ row) * 16);
    value_ =
        static_cast<uint32_t>((matrix / 2 * 8 + row) * kPlaneRowBytes + ((matrix % 2) ^ row) * 16);
#pragma unroll
    for (int n = 0; n < S::kHeadTiles; ++n) {
      maximum_[n][0] = -kInfinity;
      maximum_[n][1] = -kInfinity;
    }
  }

  __device__ void run() {
    for (int first = 0; first < num_items_; first += kBatchPages) {
      attend_batch(first);
      slot_ += kBatchPages;
      if (slot_ >= args_.plan.num_slots) {
        slot_ -= args_.plan.num_slots;
        parity_ ^= 1;
      }
    }
  }

  // Unless this warp has slices, its sums are zero. By the workers, once; then a barrier.
  __device__ void store_statistics() const {
    float* const sums = slice_rows();
    if (has_slices()) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = sum_[c];
#pragma unroll
        for (int offset = 4; offset < kWarpSize; offset *= 2) {
          sum += __shfl_xor_sync(kFullWarp, sum, offset);
        }
        if (lane_ < 4) {
          sums[slice() * kHeadPlaces + head_tile() * 8 + lane_ * 2 + c] = sum;
        }
      }
    }
    if (warp_ == 0 && lane_ < 4) {
#pragma unroll
      for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          memory_.state().maxima[n * 8 + lane_ * 2 + c] = maximum_[n][c];
        }
      }
    }
  }

  // Element j: channel channel_tile() * 16 + lane / 4 + 8 * (j / 2), head 8 * tile + 2 * (lane % 4)
  // + j % 2; relative to the maxima.
  __device__ const float (&out(int tile) const)[4] { return out_[tile]; }
  __device__ int channel_tile() const { return warp_ % S::kChannelTiles; }
  __device__ int part() const { return warp_ / S::kChannelTiles; }

 private:
  __device__ bool has_slices() const { return warp_ < kSparseBatchSlices * S::kHeadTiles; }
  __device__ int slice() const { return warp_ % kSparseBatchSlices; }
  __device__ int head_tile() const { return warp_ / kSparseBatchSlices; }
  __device__ float* slice_rows() const {
    return reinterpret_cast<float*>(memory_.base + memory_.layout.slice_rows);
  }
  __device__ uint2* weights() const {
    return reinterpret_cast<uint2*>(memory_.base + memory_.layout.weights);
  }
  __device__ void sync() const { ptx::named_barrier_sync(kWorkerBarrier, kWorkerThreads); }
  // Of a page of the batch.
  __device__ int slot(int page) const {
    const int slot = slot_ + page;
    return slot < args_.plan.num_slots ? slot : slot - args_.plan.num_slots;
  }
  __device__ uint32_t key_tile(int page) const {
    return ptx::shared_address(memory_.base) +
           static_cast<uint32_t>(slot(page) * 2 * S::kTileBytes);
  }
  __device__ void wait(int page) const {
    ptx::barrier_wait(memory_.page_full(slot(page)),
                      slot_ + page < args_.plan.num_slots ? parity_ : parity_ ^ 1);
  }

  // The tokens of a slice of the batch; 0 where it is beyond the last item.
  __device__ uint32_t slice_tokens(int first, int slice) const {
    const int item = first + slice / kSlicesPerPage;
    if (item >= num_items_) {
      return 0;
    }
    const uint64_t tokens = memory_.items()[item].tokens;
    return static_cast<uint32_t>(tokens >> (slice % kSlicesPerPage * kSliceTokens)) & 0xFFFF;
  }

  // Products of the slice's keys and one term of the queries: [token lane / 4 (+ 8)][head
  // 2 * (lane % 4) (+ 1)].
  __device__ __forceinline__ void multiply_keys(uint32_t keys,
                                                int term,
                                                float (&products)[4]) const {
    const uint32_t query =
        ptx::shared_address(memory_.base) + static_cast<uint32_t>(memory_.layout.query) +
        ((term * S::kHeadTiles + head_tile()) * S::kSteps * kWarpSize + lane_) * 8;
    float sums[2][4] = {};  // two, since each waits for its last instruction
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      uint32_t a[4];
      uint32_t b[2];
      ptx::load_matrix_x4(a, column_step(keys, key_, step));
      ptx::load_shared_x2(b, query + step * kWarpSize * 8);
      ptx::mma_m16n8k16<typename S::Element>(sums[step % 2], a, b[0], b[1]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      products[j] = sums[0][j] + sums[1][j];
    }
  }

  // Logits in base 2; -inf for tokens that are not attended to. With a soft cap: tanh(y) = 1 - 2 /
  // (e^2y + 1), where logit_scale makes e^2y a power of 2.
  __device__ __forceinline__ void make_logits(uint32_t keys,
                                              uint32_t tokens,
                                              float (&logits)[4]) const {
    multiply_keys(keys, 0, logits);
    if (args_.plan.query_terms == 2) {
      float rest[4];
      multiply_keys(keys, 1, rest);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // the rest does not know the sign of an infinity
        logits[j] = is_finite(logits[j]) ? logits[j] + rest[j] : logits[j];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      logits[j] *= args_.logit_scale;
      if (args_.soft_cap != 0.0F) {
        const float power = ptx::approximate_exp2(logits[j]);
        logits[j] = args_.soft_cap * (1.0F - __fdividef(2.0F, power + 1.0F));
      }
      logits[j] = (tokens >> (lane_ / 4 + j / 2 * 8) & 1) != 0 ? logits[j] : -kInfinity;
    }
  }

  // Writes zeros over values that are not attended to: their weights are zero, but zero times what
  // may lie there is not.
  __device__ void clear_values(uint32_t tokens, unsigned char* values) const {
    constexpr int kChunks = kPlaneRowBytes / 16;
#pragma unroll 1
    for (int i = lane_; i < S::kDim / 64 * kSliceTokens * kChunks; i += kWarpSize) {
      const int token = i / kChunks % kSliceTokens;
      const int plane = i / kChunks / kSliceTokens;
      if ((tokens >> token & 1) == 0) {
        reinterpret_cast<uint4*>(values + plane * kPlaneBytes +
                                 token * kPlaneRowBytes)[i % kChunks] = uint4{0, 0, 0, 0};
      }
    }
    ptx::fence_async_shared();
  }

  __device__ void attend_batch(int first) {
    const int page = slice() / kSlicesPerPage;
    const uint32_t tokens = has_slices() ? slice_tokens(first, slice()) : 0;
    float logits[4] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
    if (tokens != 0) {
      wait(page);
      const uint32_t keys =
          key_tile(page) + slice() % kSlicesPerPage * kSliceTokens * kPlaneRowBytes;
      if (tokens != 0xFFFF && head_tile() == 0) {
        clear_values(tokens,
                     memory_.base + (keys + S::kTileBytes - ptx::shared_address(memory_.base)));
      }
      make_logits(keys, tokens, logits);
    }
    if (has_slices()) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float maximum = fmaxf(logits[c], logits[c + 2]);
#pragma unroll
        for (int offset = 4; offset < kWarpSize; offset *= 2) {
          maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, offset));
        }
        if (lane_ < 4) {
          slice_rows()[slice() * kHeadPlaces + head_tile() * 8 + lane_ * 2 + c] = maximum;
        }
      }
    }
    sync();
    raise_maxima();
    if (tokens != 0) {
      store_weights(logits);
    }
    sync();
    add_values(first);
  }

  // Maxima of all slices so far; rescales what has been summed.
  __device__ __forceinline__ void raise_maxima() {
#pragma unroll
    for (int n = 0; n < S::kHeadTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float* const rows = slice_rows() + n * 8 + lane_ % 4 * 2 + c;
        float maximum = maximum_[n][c];
#pragma unroll
        for (int s = 0; s < kSparseBatchSlices; ++s) {
          maximum = fmaxf(maximum, rows[s * kHeadPlaces]);
        }
        base_[n][c] = maximum == -kInfinity ? 0.0F : maximum;
        const float factor = ptx::approximate_exp2(maximum_[n][c] - base_[n][c]);
        maximum_[n][c] = maximum;
        out_[n][c] *= factor;
        out_[n][c + 2] *= factor;
        if (has_slices() && n == head_tile()) {
          sum_[c] *= factor;
        }
      }
    }
  }

  // Weights as fragments of tokens 0 to 7 and 8 to 15, heads as columns.
  __device__ __forceinline__ void store_weights(const float (&logits)[4]) {
    float base[2] = {base_[0][0], base_[0][1]};
    if constexpr (S::kHeadTiles == 2) {
      base[0] = head_tile() == 1 ? base_[1][0] : base[0];
      base[1] = head_tile() == 1 ? base_[1][1] : base[1];
    }
    float exponentials[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      exponentials[j] = ptx::approximate_exp2(logits[j] - base[j % 2]);
      sum_[j % 2] += exponentials[j];
    }
    uint2 fragment;
    fragment.x =
        ptx::transpose_matrix(ptx::pack<typename S::Element>(exponentials[0], exponentials[1]));
    fragment.y =
        ptx::transpose_matrix(ptx::pack<typename S::Element>(exponentials[2], exponentials[3]));
    weights()[(slice() * S::kHeadTiles + head_tile()) * kWarpSize + lane_] = fragment;
  }

  // Adds the values of the batch's slices that this warp's part has.
  __device__ __forceinline__ void add_values(int first) {
#pragma unroll
    for (int slice = 0; slice < kSparseBatchSlices; slice += S::kParts) {
      const int own = slice + part();
      const int page = own / kSlicesPerPage;
      if (slice_tokens(first, own) == 0) {
        continue;
      }
      wait(page);
      const uint32_t values =
          key_tile(page) + S::kTileBytes + own % kSlicesPerPage * kSliceTokens * kPlaneRowBytes;
      uint32_t a[4];
      ptx::load_matrix_x4_trans(a, column_step(values, value_, channel_tile()));
#pragma unroll
      for (int n = 0; n < S::kHeadTiles; ++n) {
        const uint2 b = weights()[(own * S::kHeadTiles + n) * kWarpSize + lane_];
        ptx::mma_m16n8k16<typename S::Element>(out_[n], a, b.x, b.y);
      }
    }
    __syncwarp();
    for (int i = 0; i < kBatchPages; ++i) {
      if (lane_ == 0 && first + i < num_items_) {
        ptx::barrier_arrive(memory_.page_empty(slot(i)));
      }
    }
  }

  const KernelArgs& args_;
  const Memory& memory_;
  int num_items_;
  int warp_;
  int lane_;
  int slot_ = 0;  // of the batch's first page
  uint32_t parity_ = 0;
  uint32_t key_;    // offset of this lane's row and 16-byte chunk in a slice of keys
  uint32_t value_;  // in a slice of values
  float maximum_[S::kHeadTiles][2];
  float base_[S::kHeadTiles][2] = {};  // maximum, or 0 where that is -inf
  float sum_[2] = {};                  // over this lane's tokens, of the warp's slices
  float out_[S::kHeadTiles][4] = {};
};

// Copies the items that found no slot at first, each when its slot is empty. By one warp.
template <int kDim>
__device__ __forceinline__ void copy_items(
    const KernelArgs& args, const Memory& memory, const Unit& unit, int num_items, int lane) {
  const int slots = args.plan.num_slots;
  if (lane != 0) {
    return;
  }
  int slot = 0;
  uint32_t parity = 0;
  for (int i = slots; i < num_items; ++i) {
    ptx::barrier_wait(memory.page_empty(slot), parity);
    start_item<kDim>(args, memory, unit, slot, memory.items()[i]);
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
}

// ---- The outputs of the cluster's blocks, joined ----

// Sends what this block has to the blocks that join it: the statistics to all, of the sums each
// block's share of the channels. By the workers.
template <class S>
__device__ __forceinline__ void send_parts(
    const Memory& memory, const Unit& unit, const Attention<S>& attention, int warp, int lane) {
  constexpr int kHeads = 8 * S::kHeadTiles;
  const int channels = S::kDim >> unit.size_log2;  // of a block
  const uint32_t parts =
      ptx::shared_address(memory.base) + static_cast<uint32_t>(memory.layout.segments);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int channel = attention.channel_tile() * 16 + lane / 4 + 8 * half;
    const int place =
        ((unit.rank * S::kParts + attention.part()) * channels + (channel & (channels - 1))) *
        kHeads;
    const uint32_t address = ptx::cluster_address(parts + static_cast<uint32_t>(place) * 4,
                                                  (channel << unit.size_log2) / S::kDim);
#pragma unroll
    for (int n = 0; n < S::kHeadTiles; ++n) {
      ptx::store_cluster_x2(address + static_cast<uint32_t>(n * 8 + lane % 4 * 2) * 4,
                            attention.out(n)[2 * half],
                            attention.out(n)[2 * half + 1]);
    }
  }
  if (warp < unit.size && lane < kHeads) {
    const auto* sums = reinterpret_cast<const float*>(memory.base + memory.layout.slice_rows);
    float sum = 0.0F;
#pragma unroll
    for (int slice = 0; slice < kSparseBatchSlices; ++slice) {
      sum += sums[slice * kHeadPlaces + lane];
    }
    const uint32_t statistics = ptx::shared_address(memory.base) +
                                static_cast<uint32_t>(memory.layout.statistics) +
                                static_cast<uint32_t>(unit.rank * kHeadPlaces + lane) * 8;
    ptx::store_cluster_x2(ptx::cluster_address(statistics, warp), memory.state().maxima[lane], sum);
  }
}

// The shares of all blocks in the output of each head; the log-sum-exps. By the workers.
template <class S>
__device__ __forceinline__ void weigh_parts(
    const KernelArgs& args, const Memory& memory, const Unit& unit, int warp, int lane) {
  const auto* statistics = reinterpret_cast<const float2*>(memory.base + memory.layout.statistics);
  auto* shares = reinterpret_cast<float*>(memory.base + memory.layout.shares);
  const int head = warp;
  if (head >= unit.num_heads) {
    return;
  }
  const bool exists = lane < unit.size;
  const float2 part =
      exists ? statistics[lane * kHeadPlaces + head] : make_float2(-kInfinity, 0.0F);
  const float maximum = warp_max(part.x);
  const float base = maximum == -kInfinity ? 0.0F : maximum;
  const float own = ptx::approximate_exp2(part.x - base);
  const float total = warp_sum(own * part.y);
  if (exists) {
    shares[lane * kHeadPlaces + head] = total == 0.0F ? 0.0F : own / total;
  }
  if (lane == 0 && unit.rank == 0) {
    const int64_t index =
        unit.row * args.step.shape.search.num_query_heads + unit.first_head + head;
    args.step.lse[index] = (base + ptx::approximate_log2(total)) * kLn2;
  }
}

// Adds up this block's share of the channels and stores it. By the workers.
template <class S>
__device__ __forceinline__ void join_parts(
    const KernelArgs& args, const Memory& memory, const Unit& unit, int warp, int lane) {
  constexpr int kHeads = 8 * S::kHeadTiles;
  const auto* parts = reinterpret_cast<const float*>(memory.base + memory.layout.segments);
  const auto* shares = reinterpret_cast<const float*>(memory.base + memory.layout.shares);
  auto* sums = reinterpret_cast<float*>(memory.base + memory.layout.sums);
  const int channels = S::kDim >> unit.size_log2;
  const int outputs = channels * kHeads;
  // Warps with the same 32 outputs: each adds some blocks.
  const int sets = min(outputs / kWarpSize, kSparseWorkerWarps);  // a power of two
  const int sets_log2 = __ffs(sets) - 1;
  const int adders = kSparseWorkerWarps >> sets_log2;
  const int adder = warp >> sets_log2;
#pragma unroll 1
  for (int first = (warp & (sets - 1)) * kWarpSize; first < outputs; first += sets * kWarpSize) {
    const int output = first + lane;
    const int head = output % kHeads;
    float sum = 0.0F;
#pragma unroll 4
    for (int block = adder; block < unit.size; block += adders) {
      const float share = shares[block * kHeadPlaces + head];
#pragma unroll
      for (int part = 0; part < S::kParts; ++part) {  // what has no weight may be NaN
        const float value = parts[(block * S::kParts + part) * outputs + output];
        sum += share == 0.0F ? 0.0F : share * value;
      }
    }
    if (adders > 1) {
      sums[warp * kWarpSize + lane] = sum;
      ptx::named_barrier_sync(kWorkerBarrier, kWorkerThreads);
#pragma unroll 4
      for (int i = 1; i < adders && adder == 0; ++i) {
        sum += sums[(i * sets + warp) * kWarpSize + lane];
      }
    }
    if (adder == 0 && head < unit.num_heads) {
      const int channel = unit.rank * channels + output / kHeads;
      const int64_t row =
          unit.row * args.step.shape.search.num_query_heads + unit.first_head + head;
      store_as(
          args.step.out_dtype, args.step.out, static_cast<size_t>(row * S::kDim + channel), sum);
    }
  }
}

}  // namespace longspan::cuda::sparse
