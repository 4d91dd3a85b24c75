// Device code of the sparse decode step: scores of the summaries. The blocks of a cluster share the
// pages of summaries, and keep the scores of their own in shared memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/sparse_block.h"

namespace longspan::cuda::sparse {

// How the rows of a tile of 64 summaries are shared out: kLanesPerRow lanes have 8 elements each of
// a row, and a warp has four rows, one for every 8 lanes once it is summed up.
template <int kDim>
struct TileRows {
  static constexpr int kLanesPerRow = kDim / 8;
  static constexpr int kRowsPerWarp = kWarpSize / kLanesPerRow;
  static constexpr int kPasses = kPageTokens / (kSparseWorkerWarps * kRowsPerWarp);
  static_assert(kPasses == 1 || kPasses == 2);

  // The row that a lane has part of in a pass.
  static __device__ int loaded(int pass, int warp, int lane) {
    return (pass * kSparseWorkerWarps + warp) * kRowsPerWarp + lane / kLanesPerRow;
  }
  // The row whose sum it has in the end.
  static __device__ int summed(int warp, int lane) {
    return loaded(kPasses == 2 ? lane / 8 % 2 : 0, warp, lane);
  }
};

// The pages of candidates that a block scores: every size-th one.
struct Pages {
  int first;  // of all blocks
  int count;  // of this block

  __device__ Pages(const Unit& unit, int begin, int end) {
    first = begin / kPageTokens;
    const int all = begin < end ? (end + kPageTokens - 1) / kPageTokens - first : 0;
    count = unit.share(all);
  }
  __device__ int page(const Unit& unit, int tile) const {
    return first + unit.rank + tile * unit.size;
  }
};

// The warp that copies tiles of summaries.
template <int kDim>
class TileCopier {
 public:
  __device__ TileCopier(
      const KernelArgs& args, const Memory& memory, const Unit& unit, const Pages& pages, int lane)
      : args_(args), memory_(memory), unit_(unit), pages_(pages), lane_(lane) {}

  // Pages of the first tiles, loaded before it was known where candidates begin.
  __device__ void guess(const std::byte* page, int first_page) {
    page_ = page;
    guessed_ = pages_.first == first_page;
  }

  // All tiles up to `end`; waits for the stages that are in use.
  __device__ void copy(int end) {
    for (; tile_ < end; ++tile_) {
      if (tile_ % kWarpSize == 0 && !(tile_ == 0 && guessed_)) {
        page_ = tile_ + lane_ < pages_.count
                    ? args_.step.search.pages[pages_.page(unit_, tile_ + lane_)]
                    : nullptr;
      }
      if (tile_ >= args_.plan.num_stages) {
        ptx::barrier_wait(memory_.empty(stage_), parity_ ^ 1);
      }
      if (lane_ == tile_ % kWarpSize) {
        constexpr uint32_t kTileBytes = kPageTokens * kDim * 2;
        const uint32_t full = memory_.full(stage_);
        ptx::barrier_arrive_expect(full, kTileBytes);
        ptx::copy_bulk(
            ptx::shared_address(memory_.base) + static_cast<uint32_t>(stage_) * kTileBytes,
            page_ + static_cast<size_t>(unit_.kv_head) * kTileBytes,
            kTileBytes,
            full,
            ptx::kEvictFirst);
      }
      if (++stage_ == args_.plan.num_stages) {
        stage_ = 0;
        parity_ ^= 1;
      }
    }
  }

 private:
  const KernelArgs& args_;
  const Memory& memory_;
  const Unit& unit_;
  const Pages& pages_;
  int lane_;
  int tile_ = 0;
  int stage_ = 0;
  uint32_t parity_ = 0;
  bool guessed_ = false;
  const std::byte* page_ = nullptr;  // of a tile for each lane
};

// 8 elements of a query of type `type`, from a multiple of 8 on, as floats.
__device__ __forceinline__ void load_eight(DataType type,
                                           const void* data,
                                           int64_t index,
                                           float (&values)[8]) {
  if (type == DataType::kFloat32) {
    const float* address = static_cast<const float*>(data) + index;
    float low[4];
    float high[4];
    load_vector(address, low);
    load_vector(address + 4, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = low[i];
      values[i + 4] = high[i];
    }
  } else if (type == DataType::kFloat16) {
    load_vector(static_cast<const __half*>(data) + index, values);
  } else {
    load_vector(static_cast<const __nv_bfloat16*>(data) + index, values);
  }
}

// The heads whose queries make the list's vector, as floats [heads][D] in shared memory. By the
// workers.
__device__ __forceinline__ void load_search_query(const KernelArgs& args,
                                                  const Memory& memory,
                                                  const Unit& unit) {
  const SearchShape& shape = args.step.shape.search;
  const VectorHeads heads = vector_heads(shape, unit.kv_head, unit.list % shape.lists());
  auto* elements = reinterpret_cast<float*>(memory.base + memory.layout.segments);
  const int64_t first = (unit.row * shape.num_query_heads + heads.first) * shape.dim;
  const int chunks = heads.count * shape.dim / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < chunks; i += kWorkerThreads) {
    float values[8];
    load_eight(shape.query_dtype, args.step.search.query, first + i * 8, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      elements[i * 8 + j] = values[j];
    }
  }
}

// Makes the vector of the list of them; a lane takes the 8 elements that it multiplies with. By the
// workers.
__device__ __forceinline__ void make_vector(
    const KernelArgs& args, const Memory& memory, const Unit& unit, int chunk, float (&vector)[8]) {
  const SearchShape& shape = args.step.shape.search;
  const int heads = vector_heads(shape, unit.kv_head, unit.list % shape.lists()).count;
  auto* elements = reinterpret_cast<float*>(memory.base + memory.layout.segments);
  const auto channel = static_cast<int>(threadIdx.x);
  if (channel < shape.dim) {
    float sum = 0.0F;
#pragma unroll 4
    for (int head = 0; head < heads; ++head) {
      sum += elements[head * shape.dim + channel];
    }
    elements[heads * shape.dim + channel] =
        shape.query_form == QueryForm::kGroupMean ? sum / static_cast<float>(heads) : sum;
  }
  ptx::named_barrier_sync(kWorkerBarrier, kWorkerThreads);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    vector[i] = elements[heads * shape.dim + chunk * 8 + i];
  }
}

// The score of the row that the lane has in the end; the same in its 8 lanes. Rows are summed by
// the same tree wherever they lie, so that equal summaries tie.
template <class T, int kDim>
__device__ __forceinline__ float score_rows(const unsigned char* tile,
                                            const float (&vector)[8],
                                            int warp,
                                            int lane) {
  using Rows = TileRows<kDim>;
  float sums[Rows::kPasses];
#pragma unroll
  for (int pass = 0; pass < Rows::kPasses; ++pass) {
    const uint4 words = *reinterpret_cast<const uint4*>(
        tile + Rows::loaded(pass, warp, lane) * (kDim * 2) + lane % Rows::kLanesPerRow * 16);
    const float2 a = unpack<T>(words.x);
    const float2 b = unpack<T>(words.y);
    const float2 c = unpack<T>(words.z);
    const float2 d = unpack<T>(words.w);
    float sum = a.x * vector[0];
    sum = fmaf(a.y, vector[1], sum);
    sum = fmaf(b.x, vector[2], sum);
    sum = fmaf(b.y, vector[3], sum);
    sum = fmaf(c.x, vector[4], sum);
    sum = fmaf(c.y, vector[5], sum);
    sum = fmaf(d.x, vector[6], sum);
    sums[pass] = fmaf(d.y, vector[7], sum);
  }
  float sum = sums[0];
  if constexpr (Rows::kPasses == 2) {
    const bool upper = (lane & 8) != 0;
    const float kept = upper ? sums[1] : sums[0];
    const float sent = upper ? sums[0] : sums[1];
    sum = kept + __shfl_xor_sync(kFullWarp, sent, 8);
  }
#pragma unroll
  for (int offset = 4; offset >= 1; offset /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
  }
  return sum;
}

// After how many tiles maxima are sent. What is known when an eighth is left to do tells almost as
// much as all.
__device__ __forceinline__ int known_tiles(const Pages& pages) {
  return pages.count - pages.count / 8;
}

// Sends the maxima of the warp's groups to all blocks of the cluster.
__device__ __forceinline__ void send_maxima(const KernelArgs& args,
                                            const Memory& memory,
                                            const Unit& unit,
                                            uint32_t best,
                                            int warp,
                                            int lane) {
  ptx::cluster_wait();  // all blocks have begun
  const int groups = args.plan.groups_per_warp;
  if (groups == 1) {
    best = __reduce_max_sync(kFullWarp, best);
  }
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    const uint32_t maximum = __shfl_sync(kFullWarp, best, group * 8);
    const int index = (unit.rank * kSparseWorkerWarps + warp) * groups + group;
    if (lane < unit.size) {
      ptx::store_cluster_async(
          ptx::cluster_address(ptx::shared_address(memory.maxima() + index), lane),
          maximum,
          ptx::cluster_address(memory.maxima_full(), lane));
    }
  }
}

// Scores this block's tiles, by the workers.
template <class T, int kDim>
__device__ __forceinline__ void score_tiles(const KernelArgs& args,
                                            const Memory& memory,
                                            const Unit& unit,
                                            const Pages& pages,
                                            const float (&vector)[8],
                                            int warp,
                                            int lane) {
  const State& state = memory.state();
  const float divisor = args.step.shape.search.divisor;
  const int begin = state.begin;
  const int end = state.end;
  const int row = TileRows<kDim>::summed(warp, lane);
  const int tiles_before_sending = known_tiles(pages);
  uint32_t best = 0;
  int stage = 0;
  uint32_t parity = 0;
  if (pages.count == 0) {
    send_maxima(args, memory, unit, best, warp, lane);
  }
  for (int tile = 0; tile < pages.count; ++tile) {
    ptx::barrier_wait(memory.full(stage), parity);
    const int entry = pages.page(unit, tile) * kPageTokens + row;
    float score =
        score_rows<T, kDim>(memory.base + stage * (kPageTokens * kDim * 2), vector, warp, lane);
    __syncwarp();
    if (lane == 0) {
      ptx::barrier_arrive(memory.empty(stage));
    }
    const bool candidate = entry >= begin && entry < end;
    if (candidate && !is_finite(score)) {
      score = exact_score(args.step.search,
                          unit.row,
                          unit.kv_head,
                          unit.list % args.step.shape.search.lists(),
                          entry);
    }
    if (divisor != 1.0F) {
      score /= divisor;
    }
    const auto key = candidate ? static_cast<uint32_t>(pack_candidate(score, 0) >> 32) : 0U;
    if (lane % 8 == 0) {
      memory.keys()[tile * kPageTokens + row] = key;
    }
    best = max(best, key);
    if (tile + 1 == tiles_before_sending) {
      send_maxima(args, memory, unit, best, warp, lane);
    }
    if (++stage == args.plan.num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

}  // namespace longspan::cuda::sparse
