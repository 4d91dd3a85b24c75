// Search for many rows: a tile of 64 query rows scans the summaries of its KV head on tensor cores
// and keeps the best of each row, so that scores never reach memory.
//
// A row is one list: a token and a vector. A warp has 16 rows of the tile and all 64 summaries of a
// stage; search_rows.h keeps the best of its rows. After the first stages nearly everything is
// rejected by one comparison.
//
// Queries that are not numbers of the summaries' type are the sum of three that are, so that scores
// keep the accuracy of fp32.
#include <climits>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/convert.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/search_query.h"
#include "kernels/cuda/search_rows.h"
#include "kernels/cuda/search_topk.h"
#include "kernels/cuda/top_k.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = kSearchTileRows / kWarps;
constexpr int kStages = kSearchPrefillStages;
static_assert(kStages == 2);
constexpr int kEntries = kSearchStageEntries;  // a page
static_assert(kWarpRows == kRowsOfWarp && kEntries == kPageTokens);

extern __shared__ __align__(1024) unsigned char shared_memory[];

// The least and the greatest over a block of kWarps warps.
struct Range {
  int begin;
  int end;
};

__device__ __forceinline__ Range warp_range(const Row (&rows)[2]) {
  Range range{INT_MAX, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (rows[h].begin < rows[h].end) {
      range.begin = min(range.begin, rows[h].begin);
      range.end = max(range.end, rows[h].end);
    }
  }
  return {__reduce_min_sync(kFullWarp, range.begin), __reduce_max_sync(kFullWarp, range.end)};
}

__device__ __forceinline__ Range block_range(Range warp_range, int warp, int lane) {
  __shared__ Range ranges[kWarps];
  if (lane == 0) {
    ranges[warp] = warp_range;
  }
  __syncthreads();
  Range range = ranges[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) {
    range.begin = min(range.begin, ranges[i].begin);
    range.end = max(range.end, ranges[i].end);
  }
  return range;
}

// The rows of a warp as operands: [term][k / 16][4] for mma_m16n8k16.
template <int kDim, int kTerms>
using Queries = uint32_t[kTerms][kDim / 16][4];

// Rows of 16-bit elements in shared memory: 16-byte chunks, whose place in the row is swizzled so
// that eight rows of a column do not share banks.
template <int kDim>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(row * kDim * 2 + ((chunk ^ (row & 7)) << 4));
}

// A quotient, rounded as division rounds it, where it is a normal number: in line, without the
// special cases. Of an infinity it is NaN.
__device__ __forceinline__ float divide(float dividend, float divisor, float reciprocal) {
  const float quotient = dividend * reciprocal;
  return fmaf(fmaf(-quotient, divisor, dividend), reciprocal, quotient);
}

// Rows of a warp whose vectors are loaded at once: 16 loads on their way in each lane hide the
// memory's latency.
constexpr int kRoundsAtOnce = 4;

// Adds 8 channels of a query head, from element `index` on.
template <class Q>
__device__ __forceinline__ void add_channels(const Q* query, size_t index, float (&sum)[8]) {
#pragma unroll
  for (int part = 0; part < 8 / kVectorSize<Q>; ++part) {
    float values[kVectorSize<Q>];
    load_vector(query + index + part * kVectorSize<Q>, values);
#pragma unroll
    for (int i = 0; i < kVectorSize<Q>; ++i) {
      sum[part * kVectorSize<Q> + i] += values[i];
    }
  }
}

// The rows first_row + i * kStep, i < kRoundsAtOnce: 8 channels of their vectors from `channel` on,
// as vector_element has them one by one. Rows that do not exist are the last one again.
template <class Q, int kStep>
__device__ __forceinline__ void load_vectors(const SearchTopkArgs& args,
                                             int64_t first_token,
                                             int first_row,
                                             int kv_head,
                                             int channel,
                                             float (&sums)[kRoundsAtOnce][8]) {
  const SearchShape& shape = args.shape;
  const int lists = shape.lists();
  const auto* query = static_cast<const Q*>(args.query);
  size_t index[kRoundsAtOnce];
#pragma unroll
  for (int i = 0; i < kRoundsAtOnce; ++i) {
    const int row = first_row + i * kStep;
    const int64_t token = min(first_token + row / lists, shape.num_rows - 1);
    const int head = vector_heads(shape, kv_head, row % lists).first;
    index[i] = static_cast<size_t>((token * shape.num_query_heads + head) * shape.dim + channel);
#pragma unroll
    for (float& sum : sums[i]) {
      sum = 0.0F;
    }
  }
  const int count = vector_heads(shape, kv_head, 0).count;
#pragma unroll 4
  for (int head = 0; head < count; ++head) {
#pragma unroll
    for (int i = 0; i < kRoundsAtOnce; ++i) {
      add_channels(query, index[i] + static_cast<size_t>(head * shape.dim), sums[i]);
    }
  }
  if (shape.query_form == QueryForm::kGroupMean || shape.query_form == QueryForm::kAllMean) {
    const auto divisor = static_cast<float>(count);
    const float reciprocal = 1.0F / divisor;
#pragma unroll
    for (int i = 0; i < 8 * kRoundsAtOnce; ++i) {
      sums[i / 8][i % 8] = divide(sums[i / 8][i % 8], divisor, reciprocal);
    }
  }
}

// fp16 has few exponents: a row is scaled by a power of two, so that its terms are normal numbers.
__device__ __forceinline__ float scale_of_row(float largest) {
  if (!(largest > 0.0F) || !is_finite(largest)) {
    return 1.0F;
  }
  constexpr int kExponent = 14;  // the largest element's, below the 15 of the largest number
  return ldexpf(1.0F, min(kExponent - ilogbf(largest), 100));
}

// Puts 8 channels of a row as terms where load_queries reads them. Returns what the row was scaled
// by; `kRowLanes` lanes have the row.
template <class T, int kTerms, int kTermBytes, int kRowLanes>
__device__ __forceinline__ float store_terms(float (&values)[8], unsigned char* place) {
  float scale = 1.0F;
  if constexpr (std::is_same_v<T, __half> && kTerms > 1) {
    float largest = 0.0F;
#pragma unroll
    for (const float value : values) {
      largest = fmaxf(largest, fabsf(value));
    }
#pragma unroll
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    }
    scale = scale_of_row(largest);
#pragma unroll
    for (float& value : values) {
      value *= scale;
    }
  }
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    *reinterpret_cast<uint4*>(place + term * kTermBytes) = {ptx::pack<T>(values[0], values[1]),
                                                            ptx::pack<T>(values[2], values[3]),
                                                            ptx::pack<T>(values[4], values[5]),
                                                            ptx::pack<T>(values[6], values[7])};
#pragma unroll
    for (float& value : values) {
      value -= to_float(from_float<T>(value));
    }
  }
  return scale;
}

// The operands of a warp's rows. `scratch`: [kTerms][16][D], swizzled. `factors`: what the scores
// of rows lane / 4 + 8 h are to be multiplied by.
template <class T, int kDim, int kTerms>
__device__ __forceinline__ void load_queries(const SearchTopkArgs& args,
                                             int64_t first_token,
                                             int first_row,
                                             int kv_head,
                                             int lane,
                                             unsigned char* scratch,
                                             Queries<kDim, kTerms>& queries,
                                             float (&factors)[2]) {
  constexpr int kTermBytes = kWarpRows * kDim * 2;
  constexpr int kRowLanes = kDim / 8;
  constexpr int kStep = kWarpSize / kRowLanes;  // rows of a round
  const int chunk = lane % kRowLanes;
#pragma unroll 1
  for (int first = 0; first < kWarpRows; first += kStep * kRoundsAtOnce) {
    float sums[kRoundsAtOnce][8];
    const int row = first + lane / kRowLanes;
    switch (args.shape.query_dtype) {
      case DataType::kFloat32:
        load_vectors<float, kStep>(args, first_token, first_row + row, kv_head, chunk * 8, sums);
        break;
      case DataType::kFloat16:
        load_vectors<__half, kStep>(args, first_token, first_row + row, kv_head, chunk * 8, sums);
        break;
      case DataType::kBFloat16:
        load_vectors<__nv_bfloat16, kStep>(
            args, first_token, first_row + row, kv_head, chunk * 8, sums);
        break;
    }
#pragma unroll
    for (int i = 0; i < kRoundsAtOnce; ++i) {
      const float scale = store_terms<T, kTerms, kTermBytes, kRowLanes>(
          sums[i], scratch + swizzled<kDim>(row + i * kStep, chunk));
      if constexpr (std::is_same_v<T, __half> && kTerms > 1) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int own = lane / 4 + 8 * h - first - i * kStep;  // of the round's rows
          const float of_row = __shfl_sync(kFullWarp, scale, own % kStep * kRowLanes & 31);
          factors[h] = own >= 0 && own < kStep ? 1.0F / of_row : factors[h];
        }
      }
    }
  }
  __syncwarp();
  const uint32_t base = ptx::shared_address(scratch);
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      ptx::load_matrix_x4(queries[term][step],
                          base + static_cast<uint32_t>(term * kTermBytes) +
                              swizzled<kDim>(lane % 16, 2 * step + lane / 16));
    }
  }
}

// A page's summaries of one KV head, to a stage of shared memory.
template <int kDim>
__device__ __forceinline__ void fetch_stage(const std::byte* page, int kv_head, uint32_t stage) {
  constexpr int kChunks = kDim / 8;
  const std::byte* source = page + static_cast<size_t>(kv_head) * kEntries * kDim * 2;
  const int chunk = static_cast<int>(threadIdx.x);
  const uint32_t place = stage + swizzled<kDim>(chunk / kChunks, chunk % kChunks);
  constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kRowsAtOnce % 8 == 0, "the swizzle of a thread's rows is the same");
#pragma unroll
  for (int i = 0; i < kEntries / kRowsAtOnce; ++i) {
    ptx::copy_async_16(place + static_cast<uint32_t>(i * kRowsAtOnce * kDim * 2),
                       source + (i * kThreads + chunk) * 16);
  }
}

// Scores of the warp's rows with the summaries of a stage. The small terms go first.
template <class T, int kDim, int kTerms>
__device__ __forceinline__ void score_stage(const Queries<kDim, kTerms>& queries,
                                            uint32_t stage,
                                            int lane,
                                            Scores& scores) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = 0.0F;
    }
  }
  // The lane's chunk of step 0. That of another step differs in bits that no other part of the
  // address touches.
  const uint32_t first = stage + swizzled<kDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t summaries[kColumnTiles / 2][4];
#pragma unroll
    for (int pair = 0; pair < kColumnTiles / 2; ++pair) {
      ptx::load_matrix_x4(
          summaries[pair],
          (first ^ static_cast<uint32_t>(step * 32)) + static_cast<uint32_t>(pair * 16 * kDim * 2));
    }
#pragma unroll
    for (int term = kTerms - 1; term >= 0; --term) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        ptx::mma_m16n8k16<T>(scores[n],
                             queries[term][step],
                             summaries[n / 2][n % 2 * 2],
                             summaries[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

// Where a block works.
struct Tile {
  int64_t first_token;
  int kv_head;
};

// Candidates [first, end) of a row's buffer, as they should be where they are not finite. `row`: of
// the tile.
__device__ __forceinline__ void correct_scores(
    const SearchTopkArgs& args, const Tile& tile, int row, Candidate* first, Candidate* end) {
  const int lists = args.shape.lists();
#pragma unroll 1
  for (Candidate* candidate = first; candidate != end; ++candidate) {
    if (!is_finite(candidate->score)) {
      candidate->score = exact_score(args,
                                     tile.first_token + row / lists,
                                     tile.kv_head,
                                     row % lists,
                                     static_cast<int64_t>(candidate->id)) /
                         args.shape.divisor;
    }
  }
}

// Takes the scores of a step, the first columns of `scores`, into the rows' buffers. `first_row`:
// of the warp in the tile.
template <int kRegisters>
__device__ __forceinline__ void take_scores(const SearchTopkArgs& args,
                                            const Tile& tile,
                                            int first_row,
                                            const RowBuffers<kRegisters>& buffers,
                                            int first_entry,
                                            bool all_candidates,
                                            int lane,
                                            const Scores& scores,
                                            Row (&rows)[2]) {
  constexpr int kPlaces = RowBuffers<kRegisters>::kPlaces;
#pragma unroll 1
  while (true) {
    uint32_t columns[2];
    bool finite = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      columns[h] = passing_columns(scores, h, rows[h].threshold, finite);
      if (!all_candidates) {
        columns[h] &= candidate_columns(rows[h], first_entry, lane % 4);
      }
    }
    // The counts of both rows in one number: at most 32 each.
    int before;
    int total;
    quad_scan(__popc(columns[0]) | __popc(columns[1]) << 16, lane % 4, before, total);
    const int counts[2] = {total & 0xffff, total >> 16};
    if (__any_sync(kFullWarp,
                   rows[0].count + counts[0] > kPlaces || rows[1].count + counts[1] > kPlaces)) {
      buffers.make_room(rows);  // fewer pass then, and there is room for all that do
      continue;
    }
    Candidate* const first[2] = {buffers.end(rows[0], 0) + (before & 0xffff),
                                 buffers.end(rows[1], 1) + (before >> 16)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Candidate* const end = buffers.append(scores, h, columns[h], first_entry, first[h]);
      if (!finite) {
        correct_scores(args, tile, first_row + lane / 4 + 8 * h, first[h], end);
      }
      rows[h].count += counts[h];
    }
    return;
  }
}

// Blocks of an SM: as many as the registers of their queries and the rows' buffers allow.
template <int kTerms, int kRegisters>
constexpr int kBlocksPerSm = kRegisters == 4                  ? 1
                             : kTerms == 1 && kRegisters == 1 ? 3
                                                              : 2;

template <class T, int kDim, int kTerms, int kRegisters>
__global__ __launch_bounds__(kThreads, kBlocksPerSm<kTerms, kRegisters>) void search_prefill_kernel(
    const __grid_constant__ SearchTopkArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int first_row = warp * kWarpRows;
  const int lists_of_row = args.shape.lists();
  const int tokens_per_tile = kSearchTileRows / lists_of_row;
  const int num_kv_heads = args.shape.num_kv_heads;
  // Causal: the last tiles are the longest, and go first.
  const Tile tile{
      static_cast<int64_t>((gridDim.x - 1 - blockIdx.x) / num_kv_heads) * tokens_per_tile,
      static_cast<int>(blockIdx.x) % num_kv_heads};

  Row rows[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows[h] = make_row(args, tile.first_token, first_row + lane / 4 + 8 * h);
  }
  const Range all = block_range(warp_range(rows), warp, lane);
  const int first_stage = all.begin / kEntries;
  const int end_stage = (all.end + kEntries - 1) / kEntries;

  const uint32_t stages = ptx::shared_address(shared_memory);
  constexpr uint32_t kStageBytes = kEntries * kDim * 2;
  unsigned char* const memory_of_rows = shared_memory + kStages * kStageBytes;
  const RowBuffers<kRegisters> buffers(
      reinterpret_cast<Candidate*>(memory_of_rows) + first_row * RowBuffers<kRegisters>::kPlaces,
      lane);
  if (first_stage < end_stage) {
    fetch_stage<kDim>(args.pages[first_stage], tile.kv_head, stages);
  }
  ptx::copy_async_commit();
  const std::byte* next_page = first_stage + 1 < end_stage ? args.pages[first_stage + 1] : nullptr;
  Queries<kDim, kTerms> queries;
  float factors[2] = {1.0F, 1.0F};
  load_queries<T, kDim, kTerms>(args,
                                tile.first_token,
                                first_row,
                                tile.kv_head,
                                lane,
                                memory_of_rows + first_row * (kTerms * kDim * 2),
                                queries,
                                factors);

  for (int stage = first_stage; stage < end_stage; ++stage) {
    const uint32_t slot = static_cast<uint32_t>(stage - first_stage) % 2;
    ptx::copy_async_wait<0>();
    // The stage has arrived for all, and all are done with the last one; before the first, with
    // the queries, where the rows' buffers are.
    __syncthreads();
    if (next_page != nullptr) {
      fetch_stage<kDim>(next_page, tile.kv_head, stages + (1 - slot) * kStageBytes);
      next_page = stage + 2 < end_stage ? args.pages[stage + 2] : nullptr;
    }
    ptx::copy_async_commit();

    Scores scores;
    score_stage<T, kDim, kTerms>(queries, stages + slot * kStageBytes, lane, scores);
    if constexpr (std::is_same_v<T, __half> && kTerms > 1) {
#pragma unroll
      for (int i = 0; i < 4 * kColumnTiles; ++i) {
        scores[i / 4][i % 4] *= factors[i / 2 % 2];
      }
    }
    if (args.shape.divisor != 1.0F) {
      const float reciprocal = 1.0F / args.shape.divisor;
#pragma unroll
      for (int i = 0; i < 4 * kColumnTiles; ++i) {
        scores[i / 4][i % 4] = divide(scores[i / 4][i % 4], args.shape.divisor, reciprocal);
      }
    }
    const int first_entry = stage * kEntries;
    const bool inside = __all_sync(kFullWarp,
                                   first_entry >= max(rows[0].begin, rows[1].begin) &&
                                       first_entry + kEntries <= min(rows[0].end, rows[1].end));
#pragma unroll 1
    for (int entry = 0; entry < kEntries; entry += kSearchStepEntries) {
      take_scores(args, tile, first_row, buffers, first_entry + entry, inside, lane, scores, rows);
#pragma unroll
      for (int i = 0; i < 4 * kStepTiles; ++i) {
        scores[i / 4][i % 4] = scores[i / 4 + kStepTiles][i % 4];
      }
    }
  }

  buffers.finish(rows, [&](int row, const uint64_t(&best)[kRegisters]) {
    row += first_row;
    const int64_t token = tile.first_token + row / lists_of_row;
    if (row < tokens_per_tile * lists_of_row && token < args.shape.num_rows) {
      const int64_t list =
          (token * num_kv_heads + tile.kv_head) * lists_of_row + row % lists_of_row;
      store_list(best,
                 lane,
                 args.k[token],
                 args.shape.max_k,
                 args.scores + list * args.shape.max_k,
                 args.ids + list * args.shape.max_k);
    }
  });
}

template <class T, int kDim, int kTerms, int kRegisters>
cudaError_t launch(const SearchTopkArgs& args, const SearchPlan& plan, cudaStream_t stream) {
  const auto kernel = search_prefill_kernel<T, kDim, kTerms, kRegisters>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.num_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <class T, int kDim, int kTerms>
cudaError_t launch_lists(const SearchTopkArgs& args, const SearchPlan& plan, cudaStream_t stream) {
  switch (plan.list_registers) {
    case 1:
      return launch<T, kDim, kTerms, 1>(args, plan, stream);
    case 2:
      return launch<T, kDim, kTerms, 2>(args, plan, stream);
    default:
      return launch<T, kDim, kTerms, 4>(args, plan, stream);
  }
}

template <class T>
cudaError_t launch_type(const SearchTopkArgs& args, const SearchPlan& plan, cudaStream_t stream) {
  if (args.shape.dim == 64) {
    return plan.num_terms == 1 ? launch_lists<T, 64, 1>(args, plan, stream)
                               : launch_lists<T, 64, 3>(args, plan, stream);
  }
  return plan.num_terms == 1 ? launch_lists<T, 128, 1>(args, plan, stream)
                             : launch_lists<T, 128, 3>(args, plan, stream);
}

}  // namespace

cudaError_t launch_search_prefill(const SearchTopkArgs& args,
                                  const SearchPlan& plan,
                                  cudaStream_t stream) {
  if (plan.num_blocks == 0) {
    return cudaSuccess;
  }
  return args.shape.dtype == DataType::kFloat16 ? launch_type<__half>(args, plan, stream)
                                                : launch_type<__nv_bfloat16>(args, plan, stream);
}

cudaError_t launch_search_topk(const SearchTopkArgs& args,
                               const SearchPlan& plan,
                               std::byte* workspace,
                               uint32_t* tickets,
                               cudaStream_t stream) {
  return plan.prefill ? launch_search_prefill(args, plan, stream)
                      : launch_search_decode(args, plan, workspace, tickets, stream);
}

}  // namespace longspan::cuda
