// Search for few rows: one launch that reads every summary once, at the speed of the memory.
//
// A block has some lists (of some rows, in one set of KV heads) and a share of the entries. Its
// warps load tiles of summaries into registers, eight lanes to a row of 64-element chunks, and
// score them with all vectors of the block by fp32 FMA; a round of scores is kept in shared memory.
// Then the warps are dealt to the lists and keep the best of the round in sorted lists. At the end
// the warps' lists are merged, and the last block that arrives merges those of all shares.
//
// A score depends on its entry and vector alone: products are added in one order wherever the entry
// lies, so that equal summaries tie.
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/convert.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/search_block.h"
#include "kernels/cuda/search_query.h"
#include "kernels/cuda/search_topk.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda {
namespace {

constexpr int kWarps = kSearchDecodeWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerPass = kWarpSize / kLanesPerRow;
constexpr int kChunk = 64;  // elements that eight lanes load at once, 16 bytes each

// A tile of summaries in the registers of a warp: kPasses times four rows. Lane 8 r + c has bytes
// 16 c .. 16 c + 16 of each chunk of row 4 p + r.
template <int kDim, int kPlanes, int kVectors>
struct TileShape {
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kLoads = kChunks * kPlanes;  // of a lane for a row, four registers each
  // A power of two, so that 64 registers hold the tile, or 48 the tile and the sums of four
  // vectors.
  static constexpr int kMostPasses = kVectors == 1 ? 16 / kLoads : 12 / (kLoads + 1);
  static constexpr int kPasses = kMostPasses >= 8   ? 8
                                 : kMostPasses >= 4 ? 4
                                 : kMostPasses >= 2 ? 2
                                                    : 1;
  static constexpr int kRows = kPasses * kRowsPerPass;
};

// Where a channel of a vector lies, so that the eight lanes of a row read their four elements of a
// half chunk in one line: [plane][chunk][half][lane][4].
template <int kDim>
__device__ __forceinline__ int vector_place(int plane, int channel) {
  const int lane = channel / 8 % kLanesPerRow;
  const int half = channel / 4 % 2;
  return plane * kDim + channel / kChunk * kChunk + half * (kChunk / 2) + lane * 4 + channel % 4;
}

template <int kDim, int kPlanes, int kVectors>
__device__ __forceinline__ void prepare(const SearchTopkArgs& args,
                                        const BlockWork& work,
                                        const SharedLayout& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < work.num_rows) {
    const int row = work.first_row + thread;
    shared.limits[thread] = {static_cast<int>(args.candidate_begin[row]),
                             static_cast<int>(args.candidate_end[row]),
                             static_cast<int>(min(args.k[row], args.shape.max_k))};
  }
  const int kv_heads = args.shape.kv_heads_per_set();
  const int padded = (work.vectors() + kVectors - 1) / kVectors * kVectors;
  constexpr int kElements = kPlanes * kDim;
  for (int i = thread; i < kv_heads * padded * kElements; i += kThreads) {
    const int channel = i % kDim;
    const int plane = i / kDim % kPlanes;
    const int vector = i / kElements % padded;
    const int kv_head = work.set * kv_heads + i / kElements / padded;
    const float element = vector < work.vectors()
                              ? vector_element(args,
                                               work.first_row + vector / work.num_vectors,
                                               kv_head,
                                               work.first_vector + vector % work.num_vectors,
                                               plane,
                                               channel)
                              : 0.0F;
    shared.vectors[i / kElements * kElements + vector_place<kDim>(plane, channel)] = element;
  }
}

// Sums over the eight lanes of a row, of kPasses rows at once: the lane in place c among the eight
// gets that of pass c / (8 / kPasses). Every row is summed by the same tree.
template <int kPasses>
__device__ __forceinline__ float sum_lanes_of_row(float (&values)[kPasses], int column) {
  int remaining = kPasses;
#pragma unroll
  for (int bit = kLanesPerRow / 2; bit >= 1; bit /= 2) {
    if (remaining == 1) {
      values[0] += __shfl_xor_sync(kFullWarp, values[0], bit);
      continue;
    }
    remaining /= 2;
    const bool upper = (column & bit) != 0;
#pragma unroll
    for (int i = 0; i < remaining; ++i) {
      const float kept = upper ? values[i + remaining] : values[i];
      const float sent = upper ? values[i] : values[i + remaining];
      values[i] = kept + __shfl_xor_sync(kFullWarp, sent, bit);
    }
  }
  return values[0];
}

template <class Shape, int kPlanes>
using Tile = uint4[kPlanes][Shape::kPasses][Shape::kChunks];

// The first row of the tile that begins with entry `first`; its planes lie plane_bytes() apart.
template <int kDim>
const __device__ __forceinline__ std::byte* tile_bytes(const SearchTopkArgs& args,
                                                       int first,
                                                       int kv_head) {
  return args.pages[first / kPageTokens] +
         static_cast<size_t>(kv_head * kPageTokens + first % kPageTokens) * (kDim * 2);
}

template <int kDim>
__device__ __forceinline__ size_t plane_bytes(const SearchTopkArgs& args) {
  return static_cast<size_t>(args.shape.num_kv_heads) * (kPageTokens * kDim * 2);
}

// Asks for a tile before it is loaded, so that more is on its way than registers hold.
template <class Shape, int kDim, int kPlanes>
__device__ __forceinline__ void prefetch_tile(const SearchTopkArgs& args,
                                              int first,
                                              int kv_head,
                                              int lane) {
  if (lane < kPlanes) {
    ptx::prefetch_bulk(tile_bytes<kDim>(args, first, kv_head) +
                           static_cast<size_t>(lane) * plane_bytes<kDim>(args),
                       Shape::kRows * kDim * 2);
  }
}

template <class Shape, int kDim, int kPlanes>
__device__ __forceinline__ void load_tile(
    const SearchTopkArgs& args, int first, int kv_head, int lane, Tile<Shape, kPlanes>& tile) {
  constexpr int kRowBytes = kDim * 2;
  const std::byte* bytes = tile_bytes<kDim>(args, first, kv_head) +
                           lane / kLanesPerRow * kRowBytes + lane % kLanesPerRow * 16;
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
#pragma unroll
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
        tile[plane][pass][chunk] =
            ptx::load_streaming(bytes + plane * plane_bytes<kDim>(args) +
                                pass * kRowsPerPass * kRowBytes + chunk * kChunk * 2);
      }
    }
  }
}

// The scores of a tile with kVectors vectors; of the row 4 * pass + lane / 8 in the lanes that
// sum_lanes_of_row says.
template <class T, class Shape, int kDim, int kPlanes, int kVectors>
__device__ __forceinline__ void score_tile(const Tile<Shape, kPlanes>& tile,
                                           const float* vectors,
                                           int column,
                                           float (&scores)[kVectors]) {
  float sums[kVectors][Shape::kPasses] = {};
#pragma unroll
  for (int i = 0; i < kPlanes * Shape::kChunks * 2; ++i) {
    const int plane = i / (Shape::kChunks * 2);
    const int chunk = i / 2 % Shape::kChunks;
    float4 vector[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      vector[v] = *reinterpret_cast<const float4*>(vectors + v * kPlanes * kDim + i * (kChunk / 2) +
                                                   column * 4);
    }
#pragma unroll
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
      const uint4& words = tile[plane][pass][chunk];
      const float2 low = unpack<T>(i % 2 == 0 ? words.x : words.z);
      const float2 high = unpack<T>(i % 2 == 0 ? words.y : words.w);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float& sum = sums[v][pass];
        sum = fmaf(low.x, vector[v].x, sum);
        sum = fmaf(low.y, vector[v].y, sum);
        sum = fmaf(high.x, vector[v].z, sum);
        sum = fmaf(high.y, vector[v].w, sum);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    scores[v] = sum_lanes_of_row(sums[v], column);
  }
}

// Puts the score of a vector in its place in the round, or joins it to what is there. A NaN stays:
// whoever reads the joined score looks into it.
__device__ __forceinline__ void keep_score(ScoreJoin join, bool first, float score, float& place) {
  if (join == ScoreJoin::kNone || first) {
    place = score;
  } else if (join == ScoreJoin::kSum) {
    place += score;
  } else {
    place = place != place || place > score ? place : score;
  }
}

template <class T, int kDim, int kPlanes, int kVectors>
__global__ __launch_bounds__(kThreads, 1) void search_decode_kernel(
    const __grid_constant__ SearchTopkArgs args,
    const __grid_constant__ SearchPlan plan,
    uint64_t* part_lists,
    uint32_t* tickets) {
  using Shape = TileShape<kDim, kPlanes, kVectors>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int column = lane % kLanesPerRow;
  const BlockWork work = block_work(args.shape, plan);
  const SharedLayout shared = shared_layout(work.lists(), plan.list_registers);
  const ScoreJoin join = args.shape.join;
  const int kv_heads = args.shape.kv_heads_per_set();
  const int num_vectors = work.vectors();
  const int padded = (num_vectors + kVectors - 1) / kVectors * kVectors;

  int first = work.begin + warp * Shape::kRows;
  if (first < work.end) {
    prefetch_tile<Shape, kDim, kPlanes>(args, first, work.set * kv_heads, lane);
  }
  prepare<kDim, kPlanes, kVectors>(args, work, shared);
  __syncthreads();

  int round = work.begin;
  do {
    const int round_end = min(work.end, round + kSearchRoundEntries);
    for (; first < round_end; first += kWarps * Shape::kRows) {
      for (int kv_head = 0; kv_head < kv_heads; ++kv_head) {
        Tile<Shape, kPlanes> tile;
        load_tile<Shape, kDim, kPlanes>(args, first, work.set * kv_heads + kv_head, lane, tile);
        const bool last_kv_head = kv_head + 1 == kv_heads;
        const int next = last_kv_head ? first + kWarps * Shape::kRows : first;
        if (next < work.end) {
          const int next_kv_head = last_kv_head ? 0 : kv_head + 1;
          prefetch_tile<Shape, kDim, kPlanes>(args, next, work.set * kv_heads + next_kv_head, lane);
        }
        for (int pass = 0; pass < padded; pass += kVectors) {
          float scores[kVectors];
          score_tile<T, Shape, kDim, kPlanes, kVectors>(
              tile, shared.vectors + (kv_head * padded + pass) * kPlanes * kDim, column, scores);
          // Where a row has several lanes with its sum, the first of them goes on.
          constexpr int kLanesPerSum = kLanesPerRow / Shape::kPasses;
          const int place =
              first - round + column / kLanesPerSum * kRowsPerPass + lane / kLanesPerRow;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            if (column % kLanesPerSum == 0 && pass + v < num_vectors) {
              const int vector = pass + v;
              const bool joins = join != ScoreJoin::kNone;
              const int list = joins ? vector / work.num_vectors : vector;
              keep_score(join,
                         kv_head == 0 && vector % work.num_vectors == 0,
                         scores[v],
                         shared.scores[list * kSearchRoundEntries + place]);
            }
          }
        }
      }
    }
    __syncthreads();
    const int count = max(round_end - round, 0);
    switch (plan.list_registers) {
      case 2:
        select_round<2>(args, plan, round, count);
        break;
      case 4:
        select_round<4>(args, plan, round, count);
        break;
      default:
        select_round<8>(args, plan, round, count);
        break;
    }
    __syncthreads();
    round += kSearchRoundEntries;
  } while (round < work.end);

  switch (plan.list_registers) {
    case 2:
      return finish<2>(args, plan, part_lists, tickets);
    case 4:
      return finish<4>(args, plan, part_lists, tickets);
    default:
      return finish<8>(args, plan, part_lists, tickets);
  }
}

template <class T, int kDim, int kPlanes, int kVectors>
cudaError_t launch(const SearchTopkArgs& args,
                   const SearchPlan& plan,
                   std::byte* workspace,
                   uint32_t* tickets,
                   cudaStream_t stream) {
  const auto kernel = search_decode_kernel<T, kDim, kPlanes, kVectors>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(plan.num_splits), static_cast<unsigned>(plan.num_groups));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(
      &config, kernel, args, plan, reinterpret_cast<uint64_t*>(workspace), tickets);
}

template <class T, int kDim>
cudaError_t launch_dim(const SearchTopkArgs& args,
                       const SearchPlan& plan,
                       std::byte* workspace,
                       uint32_t* tickets,
                       cudaStream_t stream) {
  const bool one = plan.rows_per_block * plan.vectors_per_block == 1;
  if (args.shape.score == ScoreForm::kDot) {
    return one ? launch<T, kDim, 1, 1>(args, plan, workspace, tickets, stream)
               : launch<T, kDim, 1, 4>(args, plan, workspace, tickets, stream);
  }
  return one ? launch<T, kDim, 2, 1>(args, plan, workspace, tickets, stream)
             : launch<T, kDim, 2, 4>(args, plan, workspace, tickets, stream);
}

template <class T>
cudaError_t launch_type(const SearchTopkArgs& args,
                        const SearchPlan& plan,
                        std::byte* workspace,
                        uint32_t* tickets,
                        cudaStream_t stream) {
  switch (args.shape.dim) {
    case 64:
      return launch_dim<T, 64>(args, plan, workspace, tickets, stream);
    case 128:
      return launch_dim<T, 128>(args, plan, workspace, tickets, stream);
    case 192:
      return launch_dim<T, 192>(args, plan, workspace, tickets, stream);
    case 256:
      return launch_dim<T, 256>(args, plan, workspace, tickets, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_search_decode(const SearchTopkArgs& args,
                                 const SearchPlan& plan,
                                 std::byte* workspace,
                                 uint32_t* tickets,
                                 cudaStream_t stream) {
  if (plan.num_blocks == 0) {
    return cudaSuccess;
  }
  return args.shape.dtype == DataType::kFloat16
             ? launch_type<__half>(args, plan, workspace, tickets, stream)
             : launch_type<__nv_bfloat16>(args, plan, workspace, tickets, stream);
}

}  // namespace longspan::cuda
