// How the sparse decode step of Hopper is cut: pure functions of plain data, without CUDA headers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/data_type.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/search_policy.h"

namespace longspan::cuda {

// What a row attends to whatever the search says, as kernels/method.h has it: whole blocks, and
// tokens.
struct ForcedTokens {
  int first_blocks = 0;
  int last_blocks = 1;        // the query's own block included
  int64_t window_tokens = 0;  // the last ones, the query's own included
  int64_t sink_tokens = 0;    // the first ones

  // Pages that these tokens lie in, at most.
  constexpr int64_t max_pages() const {
    const int64_t sinks = (sink_tokens + 63) / 64;
    const int64_t window = window_tokens == 0 ? 0 : (window_tokens + 63) / 64 + 1;
    return (first_blocks > sinks ? first_blocks : sinks) +
           (last_blocks > window ? last_blocks : window);
  }
};

struct SparseShape {
  SearchShape search;   // num_entries: what the shard may grow to
  bool attends = true;  // otherwise it is a search alone
  ForcedTokens forced;
  DataType attention_query_dtype = DataType::kFloat32;
};

// Warps of a block: those that score and attend, one that starts copies, one that watches the
// maxima.
inline constexpr int kSparseWorkerWarps = 16;
inline constexpr int kSparseWarps = kSparseWorkerWarps + 2;
inline constexpr int kSparseMaxCluster = 16;
// Entries of all blocks of a cluster that may be among the best, once most are ruled out.
inline constexpr int kSparseMaxSurvivors = 512;
inline constexpr int kSparseMaxSlots = 16;    // pages in shared memory
inline constexpr int kSparseMaxStages = 32;   // tiles of summaries in shared memory
inline constexpr int kSparseBatchSlices = 8;  // slices of 16 tokens that are attended to at a time

// Byte offsets in shared memory. The ring comes first, aligned for the swizzle.
struct SparseLayout {
  int segments = 0;    // survivors of each block of the cluster; before: query; after: partial sums
  int keys = 0;        // [key_places] ordered scores
  int maxima = 0;      // [64 * cluster_size] of groups of entries
  int survivors = 0;   // [segment_places] of this block
  int list = 0;        // [kSparseMaxSurvivors] of all blocks
  int ranks = 0;       // [kSparseMaxSurvivors]
  int query = 0;       // fragments [terms][head tiles][D / 16][32 lanes][2 registers]
  int weights = 0;     // fragments [kSparseBatchSlices][head tiles][32 lanes][2 registers]
  int slice_rows = 0;  // [kSparseBatchSlices][16 heads] floats: maxima, at the end sums
  int statistics = 0;  // [cluster_size][16 heads] of maximum and sum
  int shares = 0;      // [cluster_size][16 heads]
  int sums = 0;        // [16 warps][32 lanes] floats
  int items = 0;       // [item_places] pages of this block
  int barriers = 0;    // full, empty [stages], page full, page empty [slots], 2 more
  int state = 0;
  int end = 0;
};
inline constexpr int kSparseItemBytes = 16;
inline constexpr int kSparseStateBytes = 512;

struct SparsePlan {
  bool supported = false;
  int cluster_size = 0;     // blocks that have a list together
  int64_t num_lists = 0;    // of all rows
  int num_stages = 0;       // tiles of 64 summaries in the ring
  int num_slots = 0;        // pages of keys and values in the ring
  int segment_places = 0;   // survivors that a block may have
  int groups_per_warp = 0;  // whose maxima are compared: 1 or 4
  int key_places = 0;       // entries that a block may have
  int item_places = 0;      // pages that a block may attend to
  int head_tiles = 0;       // of 8 query heads of a list
  int query_terms = 0;      // 16-bit numbers whose sum is an element of the attention's query
  SparseLayout layout;
  size_t shared_bytes = 0;
};

// `max_cluster_size`: 16 at most, a power of two; what the device can place.
SparsePlan plan_sparse_decode(const SparseShape& shape,
                              const DeviceInfo& device,
                              int max_cluster_size);

}  // namespace longspan::cuda
