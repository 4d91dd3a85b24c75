// Attention of many rows on Hopper: the two warps that feed the others. The lister deals out tiles,
// merges the span lists of a tile into steps of pages and copies keys and values; the query warp
// copies the queries of the next tile and brings its span lists into L2.
#pragma once

#include "kernels/cuda/attend_tiles_layout.h"

namespace longspan::cuda::tiles {

// The span lists of a tile.
struct TileLists {
  const int64_t* offsets;  // of the first one
  int count;
};

__device__ __forceinline__ TileLists lists_of(const KernelParams& kernel, TileOrder::Item item) {
  const AttendParams& params = kernel.params;
  const int64_t first_token = static_cast<int64_t>(item.tile) * kernel.tokens;
  int64_t first_head = 0;  // selection head
  if (params.num_selection_heads > 1) {
    first_head = static_cast<int64_t>(item.kv_head) * kernel.token_lists;
  }
  const auto tokens =
      static_cast<int>(min(params.num_rows - first_token, static_cast<int64_t>(kernel.tokens)));
  return {params.span_offsets + first_token * params.num_selection_heads + first_head,
          tokens * kernel.token_lists};
}

// The places of its spans.
const __device__ __forceinline__ int64_t* bounds_of(const KernelParams& kernel,
                                                    const TileLists& tile,
                                                    int list) {
  const int64_t token = list / kernel.token_lists;
  return tile.offsets + token * kernel.params.num_selection_heads + list % kernel.token_lists;
}

template <class C>
class Lister {
 public:
  __device__ Lister(const KernelParams& kernel, const TensorMaps& maps, Shared<C>& shared)
      : kernel_(kernel),
        params_(kernel.params),
        maps_(maps),
        shared_(shared),
        lane_(threadIdx.x % kWarpSize),
        last_page_(static_cast<int32_t>((kernel.params.kv.num_entries - 1) / kPageTokens)) {}

  __device__ void run() {
    int32_t index = blockIdx.x;
    publish_item(0, index);
    for (uint32_t i = 0; index < kernel_.order.num_items(); ++i) {
      item_number_ = i;
      if (lane_ == 0) {  // asked for early: the answer takes a while
        next_item_ = atomicAdd(kernel_.next_item, 1) + static_cast<int32_t>(gridDim.x);
      }
      is_announced_ = false;
      list_tile(kernel_.order.item(index));
      if (!C::kLooksAhead || !is_announced_) {
        announce_next();
      }
      index = next_item_;
    }
  }

 private:
  static constexpr int kLaneLists = C::kMaxLists / kWarpSize;

  __device__ void publish_item(uint32_t i, int32_t index) {
    const uint32_t slot = i % 2;
    wait(shared_.item_empty[slot], ((i / 2) & 1) ^ 1);
    if (lane_ == 0) {
      shared_.items[slot] = index;
      arrive(shared_.item_full[slot]);
    }
  }

  // Tells the query warp of the next tile long before this one is done.
  __device__ void announce_next() {
    next_item_ = __shfl_sync(kAllLanes, next_item_, 0);
    publish_item(item_number_ + 1, next_item_ < kernel_.order.num_items() ? next_item_ : -1);
    is_announced_ = true;
  }

  __device__ void list_tile(TileOrder::Item item) {
    kv_head_ = item.kv_head;
    open_lists(item);
    int32_t page = 0;
    while (true) {
      int32_t first = kNoPage;
#pragma unroll
      for (int i = 0; i < kLaneLists; ++i) {
        first = min(first, lists_[i].page_from(page));
      }
      first = __reduce_min_sync(kAllLanes, first);
      if (first == kNoPage) {
        break;
      }
      const std::byte* own_page = C::kLooksAhead ? page_of_lane(first) : nullptr;
      // How far the lists that see the page see whole pages, and no other list begins.
      int32_t length = kNoPage;
      uint32_t seers[kLaneLists];
      bool all = true;
#pragma unroll
      for (int i = 0; i < kLaneLists; ++i) {
        const int32_t own = lists_[i].page_from(page);
        length = min(length, own == first ? lists_[i].whole_pages_from(first) : own - first);
        seers[i] = __ballot_sync(kAllLanes, own == first);
        all = all && seers[i] == used_lists_[i];
      }
      length = __reduce_min_sync(kAllLanes, length);
      if (length > 0) {
        list_run(first, length, own_page, all ? PageView::kAll : PageView::kLists, seers);
        page = first + length;
#pragma unroll
        for (int i = 0; i < kLaneLists; ++i) {
          lists_[i].drop_until(spans_, page * kPageTokens);
        }
      } else {
        begin_page(PageView::kColumns);
#pragma unroll
        for (int i = 0; i < kLaneLists; ++i) {
          const int list = i * kWarpSize + lane_;
          shared_.columns[step_page_][list] =
              lists_[i].page_from(page) == first ? lists_[i].take_columns(spans_, first) : 0;
        }
        own_page = C::kLooksAhead ? own_page : page_of_lane(first);
        add_page(first, shuffled(own_page, 0), PageView::kColumns, seers);
        page = first + 1;
      }
      if (C::kLooksAhead && !is_announced_) {
        announce_next();
      }
    }
    end_tile();
  }

  // The cursors of the tile's lists: list lane + 32 * i in lists_[i].
  __device__ void open_lists(TileOrder::Item item) {
    const TileLists tile = lists_of(kernel_, item);
    const int64_t origin = tile.offsets[0];
    spans_ = params_.spans + origin;
#pragma unroll
    for (int i = 0; i < kLaneLists; ++i) {
      const int list = i * kWarpSize + lane_;
      const bool used = list < tile.count;
      lists_[i] = ListCursor{};
      if (used) {
        const int64_t* bounds = bounds_of(kernel_, tile, list);
        lists_[i].next = static_cast<int32_t>(bounds[0] - origin);
        lists_[i].last = static_cast<int32_t>(bounds[1] - origin);
        lists_[i].advance(spans_);
      }
      used_lists_[i] = __ballot_sync(kAllLanes, used);
    }
  }

  // A lane looks one page up, of 32 from `first` on.
  const __device__ std::byte* page_of_lane(int32_t first) const {
    return params_.kv.pages[min(first + lane_, last_page_)];
  }

  __device__ static const std::byte* shuffled(const std::byte* page, int lane) {
    const auto address = reinterpret_cast<uint64_t>(page);
    return reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, address, lane));
  }

  // `length` pages that the same lists see; a lane that looks ahead has `own_page` of the first 32.
  __device__ void list_run(int32_t first,
                           int32_t length,
                           const std::byte* own_page,
                           PageView view,
                           const uint32_t (&seers)[kLaneLists]) {
    for (int32_t done = 0; done < length; ++done) {
      const int lane = done % kWarpSize;
      if (lane == 0 && (done > 0 || !C::kLooksAhead)) {
        own_page = page_of_lane(first + done);
      }
      const std::byte* const page = shuffled(own_page, lane);
      begin_page(view);
      add_page(first + done, page, view, seers);
    }
  }

  // Makes the place of the next page free to write. The step before it is not the tile's last.
  __device__ void begin_page(PageView view) {
    if (step_page_ == 0) {
      if (held_) {
        publish_step(StepEnd::kMore);
      }
      wait(shared_.keys_empty[place_.stage], place_.phase ^ 1);
    }
    if (view == PageView::kColumns && columns_age_ != 0) {
      // The last step that used the columns; if its stage was taken since, it is done with them.
      if (columns_age_ < C::kStages) {
        wait(shared_.keys_empty[columns_place_.stage], columns_place_.phase);
      }
      columns_age_ = 0;
      columns_place_ = place_;
    }
  }

  // Adds a page to the step; the last of a step completes it.
  __device__ void add_page(int32_t page,
                           const std::byte* address,
                           PageView view,
                           const uint32_t (&seers)[kLaneLists]) {
    const int64_t whole_pages = params_.kv.num_entries / kPageTokens;
    const int64_t offset = address - params_.kv.arena;
    const int64_t tail = page == whole_pages ? params_.kv.num_entries % kPageTokens : 0;
    word_ |= page_word(step_page_, view, static_cast<uint32_t>(tail));
    if (lane_ == 0) {
#pragma unroll
      for (int i = 0; i < kLaneLists; ++i) {
        shared_.notes[place_.stage].lists[step_page_][i] = seers[i];
      }
      copy_keys(offset, step_page_);
    }
    if (step_page_ == 0) {
      first_offset_ = offset;
    }
    if (++step_page_ == C::kStepPages) {
      complete_step(offset);
    }
  }

  // The page at `page_offset` of the arena to its rows of the step's planes.
  __device__ void copy_keys(int64_t page_offset, int page_of_step) {
    constexpr int kRowBytes = C::kKeyDim * 2;
    copy_tile<C::kKeyPlanes, kRowBytes>(
        &maps_.keys,
        page_offset + static_cast<int64_t>(kv_head_) * kPageTokens * kRowBytes,
        shared_.keys[place_.stage] + page_of_step * kPagePlaneBytes,
        shared_.keys_full[place_.stage]);
  }

  __device__ void copy_values(int stage, int64_t page_offset, int page_of_step) {
    constexpr int kRowBytes = C::kValueDim * 2;
    const int64_t key_bytes =
        static_cast<int64_t>(params_.kv.num_kv_heads) * kPageTokens * C::kKeyDim * 2;
    copy_tile<C::kValuePlanes, kRowBytes>(
        &maps_.values,
        page_offset + key_bytes + static_cast<int64_t>(kv_head_) * kPageTokens * kRowBytes,
        shared_.values[stage] + page_of_step * kPagePlaneBytes,
        shared_.values_full[stage]);
  }

  template <int kPlanes, int kRowBytes>
  __device__ void copy_tile(const CUtensorMap* map,
                            int64_t offset,
                            const uint8_t* destination,
                            const uint64_t& barrier) {
    const auto bytes = static_cast<uint64_t>(offset);
    const auto row = static_cast<int32_t>(bytes / kRowBytes);
    const auto plane = static_cast<int32_t>(bytes % kRowBytes / kPlaneRowBytes);
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) {
      ptx::copy_tensor_3d(ptx::shared_address(destination) + i * C::kPlaneBytes,
                          map,
                          ptx::shared_address(&barrier),
                          0,
                          row,
                          plane + i,
                          ptx::kEvictLast);
    }
  }

  // The step's last page is at `last_offset`. The word that lets its keys be used is held back
  // until it is known whether the tile has more.
  __device__ void complete_step(int64_t last_offset) {
    if constexpr (C::kLooksAhead) {
      copy_held_values();
      values_held_ = true;
      held_offset_ = last_offset;
    } else {
      copy_step_values(place_, last_offset);
    }
    held_ = true;
    held_place_ = place_;
    held_word_ = word_;
    word_ = 0;
    place_.advance();
    columns_age_ = min(columns_age_ + 1, C::kStages);
    step_page_ = 0;
  }

  __device__ void copy_held_values() {
    if (C::kLooksAhead && values_held_) {
      copy_step_values(held_place_, held_offset_);
      values_held_ = false;
    }
  }

  __device__ void copy_step_values(Place<C::kStages> place, int64_t last_offset) {
    wait(shared_.values_empty[place.stage], place.phase ^ 1);
    if (lane_ == 0) {
      if constexpr (C::kStepPages == 2) {
        copy_values(place.stage, first_offset_, 0);
      }
      copy_values(place.stage, last_offset, C::kStepPages - 1);
      ptx::barrier_arrive_expect(ptx::shared_address(&shared_.values_full[place.stage]),
                                 C::kValueStepBytes);
    }
  }

  __device__ void publish_step(StepEnd end) {
    __syncwarp();  // all lanes' columns are written
    if (lane_ == 0) {
      shared_.notes[held_place_.stage].word = held_word_ | static_cast<uint32_t>(end);
      ptx::barrier_arrive_expect(ptx::shared_address(&shared_.keys_full[held_place_.stage]),
                                 C::kKeyStepBytes);
    }
    held_ = false;
  }

  __device__ void end_tile() {
    if constexpr (C::kStepPages == 2) {
      if (step_page_ == 1) {  // half a step: its page once more, seen by nobody
        word_ |= page_word(1, PageView::kLists, tail_of(word_, 0));
        if (lane_ == 0) {
#pragma unroll
          for (int i = 0; i < kLaneLists; ++i) {
            shared_.notes[place_.stage].lists[1][i] = 0;
          }
          copy_keys(first_offset_, 1);
        }
        complete_step(first_offset_);
      }
    }
    if (held_) {
      publish_step(StepEnd::kLast);
      copy_held_values();
    } else {
      add_empty_step();
    }
  }

  __device__ void add_empty_step() {
    wait(shared_.keys_empty[place_.stage], place_.phase ^ 1);
    wait(shared_.values_empty[place_.stage], place_.phase ^ 1);
    if (lane_ == 0) {
      shared_.notes[place_.stage].word = static_cast<uint32_t>(StepEnd::kEmpty);
      arrive(shared_.keys_full[place_.stage]);
      arrive(shared_.values_full[place_.stage]);
    }
    place_.advance();
    columns_age_ = min(columns_age_ + 1, C::kStages);
  }

  const KernelParams& kernel_;
  const AttendParams& params_;
  const TensorMaps& maps_;
  Shared<C>& shared_;
  int lane_;
  int32_t last_page_ = 0;  // of the context
  uint32_t item_number_ = 0;
  int32_t next_item_ = 0;  // lane 0, before it is announced
  bool is_announced_ = false;
  int kv_head_ = 0;
  const Span* spans_ = nullptr;  // the tile's
  ListCursor lists_[kLaneLists];
  uint32_t used_lists_[kLaneLists] = {};
  Place<C::kStages> place_;
  int step_page_ = 0;         // pages that the step has
  uint32_t word_ = 0;         // of the step, so far
  int64_t first_offset_ = 0;  // of the step's first page, in the arena
  bool held_ = false;         // a complete step whose word is held back
  bool values_held_ = false;  // and whose values are
  Place<C::kStages> held_place_;
  uint32_t held_word_ = 0;
  int64_t held_offset_ = 0;          // of its page
  int columns_age_ = C::kStages;     // steps since `columns` were used, at most kStages
  Place<C::kStages> columns_place_;  // of the step that used them
};

// Brings the beginnings of a tile's span lists into L2, where the lister soon reads them.
__device__ __forceinline__ void prefetch_lists(const KernelParams& kernel, TileOrder::Item item) {
  constexpr int kLine = 128 / sizeof(Span);
  constexpr int kMaxSpans = 64;
  const TileLists tile = lists_of(kernel, item);
  for (int list = threadIdx.x % kWarpSize; list < tile.count; list += kWarpSize) {
    const int64_t* bounds = bounds_of(kernel, tile, list);
    const int64_t end = min(bounds[1], bounds[0] + kMaxSpans);
    for (int64_t span = bounds[0]; span < end; span += kLine) {
      ptx::prefetch_l2(kernel.params.spans + span);
    }
  }
}

// The query warp. A box is all tokens of a tile or, where row_query scatters them, one.
template <class C>
__device__ void copy_queries(const KernelParams& kernel,
                             const CUtensorMap& map,
                             Shared<C>& shared) {
  const AttendParams& params = kernel.params;
  const int lane = threadIdx.x % kWarpSize;
  const int box_bytes = kernel.box_tokens * kernel.group * kPlaneRowBytes;
  const uint32_t barrier = ptx::shared_address(&shared.query_full);
  for (uint32_t i = 0;; ++i) {
    wait(shared.item_full[i % 2], (i / 2) & 1);
    const int32_t index = shared.items[i % 2];
    __syncwarp();
    if (lane == 0) {
      arrive(shared.item_empty[i % 2]);
    }
    if (index < 0) {
      break;
    }
    const TileOrder::Item item = kernel.order.item(index);
    const int64_t first_token = static_cast<int64_t>(item.tile) * kernel.tokens;
    const auto tokens =
        static_cast<int>(min(params.num_rows - first_token, static_cast<int64_t>(kernel.tokens)));
    const int boxes = (tokens + kernel.box_tokens - 1) / kernel.box_tokens;
    prefetch_lists(kernel, item);
    wait(shared.query_empty, (i & 1) ^ 1);
    if (lane == 0) {
      ptx::barrier_arrive_expect(barrier, boxes * box_bytes * C::kKeyPlanes);
    }
    __syncwarp();
    for (int copy = lane; copy < boxes * C::kKeyPlanes; copy += kWarpSize) {
      const int box = copy / C::kKeyPlanes;
      const int plane = copy % C::kKeyPlanes;
      const int64_t token = first_token + box * kernel.box_tokens;
      const int64_t query = params.row_query == nullptr ? token : params.row_query[token];
      ptx::copy_tensor_3d(ptx::shared_address(shared.query) +
                              plane * C::kTileRows * kPlaneRowBytes + box * box_bytes,
                          &map,
                          barrier,
                          plane * kPlaneElements,
                          item.kv_head * kernel.group,
                          static_cast<int32_t>(query),
                          ptx::kEvictFirst);
    }
  }
}

}  // namespace longspan::cuda::tiles
