#include "kernels/cuda/sparse_policy.h"

#include <algorithm>

#include "base/checked.h"

namespace longspan::cuda {
namespace {

constexpr int64_t kMaxListLength = 256;
constexpr int64_t kMaxEntries = int64_t{1} << 30;
constexpr int64_t kMaxForcedPages = 1024;
constexpr int kMaxHeads = 16;  // of a list
constexpr int kTileEntries = 64;

bool is_supported(const SparseShape& shape, const DeviceInfo& device) {
  const SearchShape& search = shape.search;
  const bool one_vector_a_list = search.score == ScoreForm::kDot &&
                                 search.join == ScoreJoin::kNone && !search.join_all_heads &&
                                 search.query_form != QueryForm::kAllMean;
  return device.is_hopper() && one_vector_a_list && search.dtype != DataType::kFloat32 &&
         (search.dim == 64 || search.dim == 128) && search.group() <= kMaxHeads &&
         search.max_k <= kMaxListLength && search.num_entries <= kMaxEntries &&
         shape.forced.max_pages() <= kMaxForcedPages &&
         (shape.attention_query_dtype == DataType::kFloat32 ||
          shape.attention_query_dtype == search.dtype);
}

// As many blocks as keep the device busy, but enough for the maxima of their groups to tell the
// best max_k from the rest.
int cluster_size(const SparseShape& shape, const DeviceInfo& device, int64_t lists, int most) {
  int least = 2;
  while (least * 32 < shape.search.max_k) {
    least *= 2;
  }
  // Clusters of 16 need a whole GPC each: on an H100 eight of them took longer than eight of 8.
  constexpr int kMaxListsOfLargest = 7;
  int size = lists > kMaxListsOfLargest ? std::min(most, kSparseMaxCluster / 2) : most;
  while (size > least && lists * size > device.num_sms) {
    size /= 2;
  }
  return size;
}

// All offsets, relative to the end of a ring without stages.
SparseLayout layout_behind_ring(const SparseShape& shape, const SparsePlan& plan) {
  constexpr int kMaxValueParts = 4;
  const int dim = shape.search.dim;
  const int heads = 8 * plan.head_tiles;
  const int parts = kSparseWorkerWarps / (dim / 16);
  static_assert(kSparseWorkerWarps / (64 / 16) == kMaxValueParts);
  SparseLayout layout;
  int end = 0;
  const auto take = [&](int bytes) {
    const int begin = end;
    end += (bytes + 15) / 16 * 16;
    return begin;
  };
  layout.segments = take(std::max({plan.cluster_size * plan.segment_places * 8,
                                   parts * dim * heads * 4,
                                   (shape.search.group() + 1) * dim * 4}));
  layout.keys = take(plan.key_places * 4);
  layout.maxima = take(plan.cluster_size * kSparseWorkerWarps * plan.groups_per_warp * 4);
  layout.survivors = take(plan.segment_places * 8);
  layout.list = take(kSparseMaxSurvivors * 8);
  layout.ranks = take(kSparseMaxSurvivors * 4);
  layout.query = take(plan.query_terms * plan.head_tiles * (dim / 16) * 32 * 8);
  layout.weights = take(kSparseBatchSlices * plan.head_tiles * 32 * 8);
  layout.slice_rows = take(kSparseBatchSlices * kMaxHeads * 4);
  layout.statistics = take(plan.cluster_size * kMaxHeads * 8);
  layout.shares = take(plan.cluster_size * kMaxHeads * 4);
  layout.sums = take(kSparseWorkerWarps * 32 * 4);
  layout.items = take(plan.item_places * kSparseItemBytes);
  layout.barriers = take((2 * kSparseMaxStages + 2 * kSparseMaxSlots + 2) * 8);
  layout.state = take(kSparseStateBytes);
  layout.end = end;
  return layout;
}

void move_layout(int bytes, SparseLayout& layout) {
  for (int* offset : {&layout.segments,
                      &layout.keys,
                      &layout.maxima,
                      &layout.survivors,
                      &layout.list,
                      &layout.ranks,
                      &layout.query,
                      &layout.weights,
                      &layout.slice_rows,
                      &layout.statistics,
                      &layout.shares,
                      &layout.sums,
                      &layout.items,
                      &layout.barriers,
                      &layout.state,
                      &layout.end}) {
    *offset += bytes;
  }
}

}  // namespace

SparsePlan plan_sparse_decode(const SparseShape& shape,
                              const DeviceInfo& device,
                              int max_cluster_size) {
  SparsePlan plan;
  if (!is_supported(shape, device)) {
    return plan;
  }
  const SearchShape& search = shape.search;
  plan.num_lists = search.num_rows * search.num_kv_heads * search.lists();
  plan.cluster_size = cluster_size(shape, device, plan.num_lists, max_cluster_size);
  plan.segment_places = static_cast<int>(search.max_k) + 64;
  plan.groups_per_warp = kSparseWorkerWarps * plan.cluster_size >= 4 * search.max_k ? 1 : 4;
  const int64_t pages = divide_up(search.num_entries, kTileEntries);
  const int64_t key_places = divide_up(pages, plan.cluster_size) * kTileEntries;
  plan.head_tiles = search.group() / search.lists() > 8 ? 2 : 1;
  plan.query_terms = shape.attention_query_dtype == DataType::kFloat32 ? 2 : 1;
  plan.item_places =
      static_cast<int>(divide_up(search.max_k + shape.forced.max_pages(), plan.cluster_size));
  const auto limit = static_cast<int64_t>(device.shared_memory_per_block);
  if (key_places * 4 > limit || plan.num_lists * plan.cluster_size > kMaxEntries) {
    return plan;
  }
  plan.key_places = static_cast<int>(key_places);
  plan.layout = layout_behind_ring(shape, plan);
  const int64_t stage_bytes = int64_t{kTileEntries} * search.dim * 2;
  const int64_t stages =
      std::min<int64_t>((limit - plan.layout.end) / stage_bytes, kSparseMaxStages);
  plan.num_stages = static_cast<int>(std::max<int64_t>(stages, 0));
  plan.num_slots = std::min(plan.num_stages / 2, kSparseMaxSlots);
  move_layout(static_cast<int>(plan.num_stages * stage_bytes), plan.layout);
  plan.shared_bytes = static_cast<size_t>(plan.layout.end);
  // A batch of two pages is attended to at a time.
  plan.supported = plan.num_slots >= 2;
  return plan;
}

}  // namespace longspan::cuda
