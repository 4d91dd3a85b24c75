// How split-KV decode shares out its work: pure arithmetic, the same in every thread block, in the
// kernel that joins the parts, and in the tests.
//
// An item is one query row and one KV head (or one query head, where each has a list of its own).
// Its payload is the slices that its list of spans touches: 16 tokens of one page. All items in
// order, each with a fixed cost in front, make one line of positions, which is cut into ranges of
// equal length, one for each thread block. An item that a cut goes through leaves one part in each
// of its blocks.
#pragma once

#include <cstdint>

#include "kernels/page.h"

namespace longspan::cuda {

inline constexpr int kSliceTokens = 16;
inline constexpr int kSlicesPerPage = kPageTokens / kSliceTokens;

// Slices that tokens [begin, end) touch.
constexpr int64_t span_slices(int64_t begin, int64_t end) {
  return end > begin ? (end + kSliceTokens - 1) / kSliceTokens - begin / kSliceTokens : 0;
}

// Positions of an item with so many slices: whole pages, and at least one, so that an item without
// slices has a block that answers for it.
constexpr int64_t item_length(int64_t slices, int overhead) {
  const int64_t pages = (slices + kSlicesPerPage - 1) / kSlicesPerPage;
  const int64_t length = overhead + pages * kSlicesPerPage;
  return length > 0 ? length : kSlicesPerPage;
}

// Positions of a block, in whole pages.
constexpr int64_t block_length(int64_t total_length, int num_blocks) {
  const int64_t length = (total_length + num_blocks - 1) / num_blocks;
  return (length + kSlicesPerPage - 1) / kSlicesPerPage * kSlicesPerPage;
}

// The parts that an item is cut into: one in each of the blocks [first_block, first_block +
// num_parts); none if it has no slices.
struct DecodeParts {
  int num_parts = 0;
  int first_block = 0;
};

constexpr DecodeParts item_parts(int64_t start, int64_t slices, int overhead, int64_t length) {
  const int64_t payload = start + overhead;
  const auto first = static_cast<int>(payload / length);
  if (slices == 0) {
    return {0, first};
  }
  const auto last = static_cast<int>((payload + slices - 1) / length);
  return {last - first + 1, first};
}

// Where a part is kept until the parts of its item are joined. A block has at most two: of the item
// that began in an earlier block, and of the one that goes on in the next.
constexpr int64_t part_slot(const DecodeParts& parts, int block) {
  return 2 * static_cast<int64_t>(block) + (block == parts.first_block ? 1 : 0);
}

// An item, and what one block does for it.
struct DecodeItem {
  int64_t list = 0;    // of spans
  int unit = 0;        // which of the items that share the list
  int64_t start = 0;   // position
  int64_t length = 0;  // positions
  int64_t slices = 0;  // of the list
  int64_t begin = 0;   // the block's slices of the list: [begin, end)
  int64_t end = 0;
};

// Walks over the items of one block. `starts` are the positions at which the items of each list
// begin were they one each, [num_lists + 1]; `slices` the slices of each list.
class DecodeCursor {
 public:
  constexpr DecodeCursor(const int64_t* starts,
                         const int32_t* slices,
                         int64_t num_lists,
                         int units_per_list,
                         int overhead,
                         int64_t length,
                         int block)
      : starts_(starts),
        slices_(slices),
        units_per_list_(units_per_list),
        overhead_(overhead),
        range_begin_(block * length),
        range_end_(range_begin_ + length) {
    const int64_t total = starts[num_lists] * units_per_list;
    range_end_ = range_end_ < total ? range_end_ : total;
    if (!valid()) {
      return;
    }
    int64_t low = 0;  // the last list that begins at or before the range
    int64_t high = num_lists;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (starts[middle] * units_per_list <= range_begin_ ? low : high) = middle;
    }
    item_.list = low;
    enter_list();
    item_.unit = static_cast<int>((range_begin_ - item_.start) / item_.length);
    item_.start += item_.unit * item_.length;
    cut();
  }

  constexpr bool valid() const { return item_.start < range_end_ && range_begin_ < range_end_; }
  constexpr const DecodeItem& item() const { return item_; }
  // Whether the item begins in this block: it answers for an item without slices.
  constexpr bool owns() const { return item_.start >= range_begin_; }

  constexpr void next() {
    item_.start += item_.length;
    if (++item_.unit == units_per_list_) {
      item_.unit = 0;
      ++item_.list;
    }
    if (valid()) {
      if (item_.unit == 0) {
        enter_list();
      }
      cut();
    }
  }

 private:
  constexpr void enter_list() {
    item_.start = starts_[item_.list] * units_per_list_;
    item_.length = starts_[item_.list + 1] - starts_[item_.list];
    item_.slices = slices_[item_.list];
  }
  constexpr void cut() {
    const int64_t payload = item_.start + overhead_;
    item_.begin = range_begin_ > payload ? range_begin_ - payload : 0;
    item_.end = range_end_ - payload < item_.slices ? range_end_ - payload : item_.slices;
  }

  const int64_t* starts_;
  const int32_t* slices_;
  int units_per_list_;
  int overhead_;
  int64_t range_begin_;
  int64_t range_end_;
  DecodeItem item_;
};

// What a decode looks like from the host, which does not know the lengths.
struct DecodeShape {
  int64_t num_rows = 0;
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int num_selection_heads = 1;
  int key_dim = 0;
  int value_dim = 0;
  bool one_row_a_page = true;  // no two rows read the same page
};

// How the query heads of a row are dealt to items.
struct ItemHeads {
  int heads_per_item = 1;  // query heads that share an item's keys and values
  int units_per_list = 1;  // items that share a list of spans
  int heads_per_tile = 8;  // query heads that one warp works on: 8 or 16
  int num_head_sets = 1;   // sets of four warps, each with its tile of heads
};

inline constexpr int kMaxHeadsPerItem = 32;

// Whether each query head has a list of its own, which is not that of its group.
constexpr bool has_list_a_head(const DecodeShape& shape) {
  return shape.num_selection_heads == shape.num_query_heads &&
         shape.num_query_heads > shape.num_kv_heads;
}

constexpr ItemHeads item_heads(const DecodeShape& shape) {
  ItemHeads heads;
  heads.heads_per_item = has_list_a_head(shape) ? 1 : shape.num_query_heads / shape.num_kv_heads;
  heads.units_per_list = shape.num_selection_heads == 1 ? shape.num_kv_heads : 1;
  heads.heads_per_tile = heads.heads_per_item > 8 ? 16 : 8;
  heads.num_head_sets = (heads.heads_per_item + heads.heads_per_tile - 1) / heads.heads_per_tile;
  return heads;
}

// Most pages in shared memory; `fixed_bytes` go beside them, of `stage_bytes` each.
inline constexpr int kMaxDecodeStages = 12;
constexpr int decode_stages(int shared_bytes, int fixed_bytes, int stage_bytes) {
  const int stages = (shared_bytes - fixed_bytes) / stage_bytes;
  return stages < kMaxDecodeStages ? stages : kMaxDecodeStages;
}

// What the host decides about lists of spans: plain data.
struct DecodePlan {
  ItemHeads heads;
  int num_stages = 0;          // pages of keys and values in shared memory
  int num_blocks = 0;          // thread blocks, one on each SM
  int overhead = 0;            // fixed cost of an item, in slices
  bool evict_first = true;     // no page is read twice
  bool plan_in_kernel = true;  // each block counts the slices of all lists itself
};

// Lists that each block counts itself. More would take it longer than a kernel of their own does.
inline constexpr int kMaxListsInKernel = 64;

constexpr DecodePlan plan_decode(const DecodeShape& shape, int num_sms) {
  constexpr int kItemOverhead = kSlicesPerPage;
  DecodePlan plan;
  plan.heads = item_heads(shape);
  plan.num_blocks = num_sms;
  const int64_t num_lists = shape.num_rows * shape.num_selection_heads;
  plan.plan_in_kernel = num_lists <= kMaxListsInKernel;
  // With few items each is cut many times, and cuts that fall on the items' ends save parts.
  const bool many_items = num_lists * plan.heads.units_per_list * 2 > num_sms;
  plan.overhead = many_items ? kItemOverhead : 0;
  plan.evict_first = shape.one_row_a_page && !has_list_a_head(shape);
  return plan;
}

// What the host decides about lists of pages that have one length: an item has a cluster of blocks
// of its own, and block r of them takes entries r, r + cluster_size, ... of the list.
struct PagesPlan {
  ItemHeads heads;
  int64_t num_items = 0;
  int cluster_size = 1;  // a power of two
  int num_stages = 0;    // pages of keys and values in shared memory
  bool evict_first = true;
};

inline constexpr int kMaxClusterSize = 16;

// The largest clusters that leave no block without an entry or without an SM. `max_cluster_size`:
// what the device takes.
constexpr PagesPlan plan_pages(const DecodeShape& shape,
                               int64_t max_pages,
                               int num_sms,
                               int max_cluster_size) {
  PagesPlan plan;
  plan.heads = item_heads(shape);
  plan.num_items = shape.num_rows * shape.num_selection_heads * plan.heads.units_per_list;
  while (2 * plan.cluster_size <= max_cluster_size && 2 * plan.cluster_size <= max_pages &&
         2 * plan.cluster_size * plan.num_items <= num_sms) {
    plan.cluster_size *= 2;
  }
  plan.evict_first = shape.one_row_a_page && !has_list_a_head(shape);
  return plan;
}

// Entries of a list that each block of a cluster takes at most.
constexpr int64_t entries_per_block(int64_t max_pages, int cluster_size) {
  return (max_pages + cluster_size - 1) / cluster_size;
}

}  // namespace longspan::cuda
