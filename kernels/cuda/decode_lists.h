// Device code of split-KV decode: counting the slices of lists of spans, and walking over them.
#pragma once

#include <cstdint>

#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/warp.h"
#include "kernels/params.h"

namespace longspan::cuda::decode {

// Slices of a list, by `num_lanes` neighbouring lanes of which this is number `lane`; the whole
// warp runs it, num_lanes a power of two. Lists beyond the last count nothing.
__device__ __forceinline__ int64_t count_slices(const AttendParams& params,
                                                int64_t list,
                                                int lane,
                                                int num_lanes) {
  int64_t count = 0;
  if (list < params.num_rows * params.num_selection_heads) {
    const int64_t end = params.span_offsets[list + 1];
    for (int64_t i = params.span_offsets[list] + lane; i < end; i += num_lanes) {
      count += span_slices(params.spans[i].begin, params.spans[i].end);
    }
  }
  for (int offset = num_lanes / 2; offset > 0; offset /= 2) {
    count += __shfl_xor_sync(kFullWarp, count, offset);
  }
  return count;
}

__device__ __forceinline__ int64_t warp_inclusive_sum(int64_t value, int lane) {
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int64_t below = __shfl_up_sync(kFullWarp, value, offset);
    value += lane >= offset ? below : 0;
  }
  return value;
}

// Up to 32 consecutive slices of a list, one a lane.
struct SliceBatch {
  int position;          // of lane 0
  int count;             // lanes in use
  int slice;             // of the context
  uint32_t range;        // as in StageInfo
  uint32_t whole_pages;  // lanes at which a whole page begins: its four slices follow one another
  const std::byte* page;
};

// Walks over the slices of a list of spans, by one warp.
class SliceWalker {
 public:
  __device__ SliceWalker(const Span* spans,
                         int64_t num_spans,
                         const std::byte* const* pages,
                         int lane)
      : spans_(spans), num_spans_(num_spans), pages_(pages), lane_(lane) {}

  // The slices from `begin` on, which is not before the last call's, and not beyond `end`.
  __device__ SliceBatch next(int begin, int end) {
    SliceBatch batch = {};
    batch.position = begin;
    if (begin >= end) {
      return batch;
    }
    while (begin >= chunk_end_) {
      load_chunk();
    }
    const int limit = end < chunk_end_ ? end : chunk_end_;
    const int count = limit - begin < kWarpSize ? limit - begin : kWarpSize;
    find(begin + (lane_ < count ? lane_ : count - 1), batch);
    const int previous = __shfl_up_sync(kFullWarp, batch.slice, 1);
    const uint32_t follows =
        __ballot_sync(kFullWarp, lane_ > 0 && lane_ < count && batch.slice == previous + 1);
    batch.count = count;
    if (begin + count < limit) {  // a page that the batch cuts is left to the next one
      const int last = __shfl_sync(kFullWarp, batch.slice, kWarpSize - 1) % kSlicesPerPage;
      const uint32_t run = ((1U << last) - 1) << (kWarpSize - last - 1) << 1;
      const bool cut = last + 1 < kSlicesPerPage && (follows & run) == run;
      batch.count -= cut ? last + 1 : 0;
    }
    const bool whole = batch.slice % kSlicesPerPage == 0 && lane_ + kSlicesPerPage <= batch.count &&
                       ((follows >> lane_) & 0xE) == 0xE;
    batch.whole_pages = __ballot_sync(kFullWarp, whole);
    if (lane_ < batch.count) {
      batch.page = pages_[batch.slice / kSlicesPerPage];
    }
    return batch;
  }

 private:
  // 32 spans, one a lane, and the positions at which they end.
  __device__ void load_chunk() {
    const int64_t index = next_span_ + lane_;
    span_begin_ = index < num_spans_ ? static_cast<int>(spans_[index].begin) : 0;
    span_end_ = index < num_spans_ ? static_cast<int>(spans_[index].end) : 0;
    num_slices_ = static_cast<int>(span_slices(span_begin_, span_end_));
    int end = num_slices_;
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int below = __shfl_up_sync(kFullWarp, end, offset);
      end += lane_ >= offset ? below : 0;
    }
    end_position_ = chunk_end_ + end;
    chunk_end_ = __shfl_sync(kFullWarp, end_position_, kWarpSize - 1);
    next_span_ += kWarpSize;
  }

  // Slice and range at a position of the chunk, a position for each lane.
  __device__ void find(int position, SliceBatch& batch) const {
    int owner = 0;  // the lane whose span has it
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      const int end = __shfl_sync(kFullWarp, end_position_, owner + step - 1);
      owner += end <= position ? step : 0;
    }
    const int begin = __shfl_sync(kFullWarp, span_begin_, owner);
    const int end = __shfl_sync(kFullWarp, span_end_, owner);
    const int start = __shfl_sync(kFullWarp, end_position_ - num_slices_, owner);
    batch.slice = begin / kSliceTokens + position - start;
    const int first_token = batch.slice * kSliceTokens;
    const int first = begin > first_token ? begin - first_token : 0;
    const int last = (end - first_token < kSliceTokens ? end - first_token : kSliceTokens) - 1;
    batch.range = static_cast<uint32_t>(first | (last << 4));
  }

  const Span* spans_;
  int64_t num_spans_;
  const std::byte* const* pages_;
  int lane_;
  int64_t next_span_ = 0;
  int chunk_end_ = 0;  // position after the chunk
  int span_begin_ = 0;
  int span_end_ = 0;
  int num_slices_ = 0;
  int end_position_ = 0;
};

}  // namespace longspan::cuda::decode
