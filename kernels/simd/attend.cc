// Attention in tiles of rows: every query head of a KV head shares each page that a tile reads, and
// so do neighbouring rows. Where that makes fewer tasks than threads (decode), the pages of a tile
// are dealt to several tasks, and their partial results merged.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/checked.h"
#include "kernels/simd/page_sweep.h"
#include "kernels/simd/stages.h"

namespace longspan::simd {
namespace {

// Lanes (rows times heads of a KV head) of a tile: enough to pay for packing a page, few enough for
// their accumulators to stay in the second-level cache.
constexpr int64_t kTileLanes = 96;
// Tasks for each thread when pages are dealt out, so that one slow task does not leave others idle.
constexpr int64_t kTasksPerThread = 4;
// Pages that a task of its own is worth.
constexpr int64_t kMinTaskPages = 8;

// The pages [first_page, end_page) of some rows and one KV head; one of `num_parts` tasks that
// share these rows.
struct Task {
  int64_t first_row = 0;
  int64_t num_rows = 0;
  int kv_head = 0;
  int64_t first_page = 0;
  int64_t end_page = PageSweep::kNoPage;
  int64_t part = 0;
  int64_t num_parts = 1;
  float* part_out = nullptr;  // [num_parts][rows * group][E], with several parts
  float* part_lse = nullptr;  // [num_parts][rows * group]
};

class Attention {
 public:
  Attention(const AttendParams& params, Machine& machine)
      : params_(params),
        machine_(machine),
        group_(params.num_query_heads / params.kv.num_kv_heads),
        lists_per_row_(params.num_selection_heads == params.num_query_heads ? group_ : 1),
        padded_dim_(divide_up(params.kv.value_dim, kValuePadding) * int64_t{kValuePadding}) {}

  Status run();

 private:
  void plan();
  void plan_parts(const Task& whole);
  Status reserve();
  void place_parts();
  void attend_task(const Task& task, int thread);
  AttendTile make_tile(const Task& task, Arena& arena) const;
  void add_lists(const Task& task, PageSweep& sweep) const;
  void sweep_pages(const Task& task, PageSweep& sweep, AttendTile& tile, Arena& arena) const;
  void finish(const Task& task, const AttendTile& tile) const;
  void merge_parts(const Task& first) const;

  int64_t out_lane(const Task& task, int64_t lane) const {
    return (task.first_row + lane / group_) * params_.num_query_heads + task.kv_head * group_ +
           lane % group_;
  }

  const AttendParams& params_;
  Machine& machine_;
  int64_t group_;          // query heads of a KV head
  int64_t lists_per_row_;  // span lists of a row and a KV head: one, or one for each head
  int64_t padded_dim_;
  int64_t tile_rows_ = 1;
  std::vector<Task> tasks_;
  std::vector<PageSweep> sweeps_;  // one for each thread
};

void Attention::plan() {
  const int64_t num_kv_heads = params_.kv.num_kv_heads;
  tile_rows_ = std::clamp<int64_t>(kTileLanes / group_, 1, std::max<int64_t>(params_.num_rows, 1));
  const int64_t num_tiles = divide_up(params_.num_rows, tile_rows_);
  const int64_t num_threads = machine_.pool.num_threads();
  const bool deal_pages =
      num_threads > 1 && num_tiles * num_kv_heads < kTasksPerThread * num_threads;
  // Later rows usually see more: they go first.
  for (int64_t tile = num_tiles - 1; tile >= 0; --tile) {
    for (int kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
      Task task;
      task.first_row = tile * tile_rows_;
      task.num_rows = std::min(tile_rows_, params_.num_rows - task.first_row);
      task.kv_head = kv_head;
      if (deal_pages) {
        plan_parts(task);
      } else {
        tasks_.push_back(task);
      }
    }
  }
}

// Cuts the pages that the tile touches into runs of equal number.
void Attention::plan_parts(const Task& whole) {
  PageSweep& sweep = sweeps_[0];
  add_lists(whole, sweep);
  std::vector<int64_t> pages;
  for (sweep.start(); sweep.page() != PageSweep::kNoPage; sweep.advance()) {
    pages.push_back(sweep.page());
  }
  const auto num_pages = static_cast<int64_t>(pages.size());
  const int64_t num_tasks = divide_up(params_.num_rows, tile_rows_) * params_.kv.num_kv_heads;
  const int64_t wanted = divide_up(kTasksPerThread * machine_.pool.num_threads(), num_tasks);
  const int64_t num_parts = std::clamp<int64_t>(num_pages / kMinTaskPages, 1, wanted);
  for (int64_t part = 0; part < num_parts; ++part) {
    Task task = whole;
    task.part = part;
    task.num_parts = num_parts;
    const auto first = static_cast<size_t>(part * num_pages / num_parts);
    const auto end = static_cast<size_t>((part + 1) * num_pages / num_parts);
    task.first_page = part == 0 ? 0 : pages[first];
    task.end_page = part + 1 == num_parts ? PageSweep::kNoPage : pages[end];
    tasks_.push_back(task);
  }
}

Status Attention::reserve() {
  const auto lanes = static_cast<size_t>(tile_rows_ * group_);
  const auto key_dim = static_cast<size_t>(params_.kv.key_dim);
  const auto value_dim = static_cast<size_t>(padded_dim_);
  const size_t floats = lanes * (3 + value_dim + key_dim + kPageTokens + kPageTokens / 2) +
                        kPageTokens * (2 * key_dim + value_dim);
  const size_t bytes = floats * sizeof(float) + 3 * lanes * sizeof(const float*) +
                       lanes * (sizeof(int32_t) + sizeof(uint64_t));
  for (Arena& arena : machine_.arenas) {
    LONGSPAN_RETURN_IF_ERROR(arena.reserve(bytes, /*num_takes=*/14));
  }
  size_t part_lanes = 0;
  for (const Task& task : tasks_) {
    part_lanes += task.num_parts > 1 ? static_cast<size_t>(task.num_rows * group_) : 0;
  }
  LONGSPAN_RETURN_IF_ERROR(machine_.shared.reserve(
      part_lanes * (static_cast<size_t>(params_.kv.value_dim) + 1) * sizeof(float),
      2 * tasks_.size()));
  place_parts();
  return absl::OkStatus();
}

void Attention::place_parts() {
  for (size_t i = 0; i < tasks_.size(); i += static_cast<size_t>(tasks_[i].num_parts)) {
    const Task& first = tasks_[i];
    if (first.num_parts == 1) {
      continue;
    }
    const auto lanes = static_cast<size_t>(first.num_parts * first.num_rows * group_);
    auto* out = machine_.shared.take<float>(lanes * static_cast<size_t>(params_.kv.value_dim));
    auto* lse = machine_.shared.take<float>(lanes);
    for (int64_t part = 0; part < first.num_parts; ++part) {
      Task& task = tasks_[i + static_cast<size_t>(part)];
      task.part_out = out;
      task.part_lse = lse;
    }
  }
}

Status Attention::run() {
  sweeps_.resize(machine_.arenas.size());
  plan();
  LONGSPAN_RETURN_IF_ERROR(reserve());
  const auto num_tasks = static_cast<int64_t>(tasks_.size());
  machine_.pool.run(num_tasks, [this](int64_t index, int thread) {
    attend_task(tasks_[static_cast<size_t>(index)], thread);
  });
  // Only decode has parts, and too few for waking the threads again to pay.
  for (const Task& task : tasks_) {
    if (task.num_parts > 1 && task.part == 0) {
      merge_parts(task);
    }
  }
  return absl::OkStatus();
}

void Attention::attend_task(const Task& task, int thread) {
  Arena& arena = machine_.arenas[static_cast<size_t>(thread)];
  PageSweep& sweep = sweeps_[static_cast<size_t>(thread)];
  arena.reset();
  AttendTile tile = make_tile(task, arena);
  machine_.target.begin_tile(tile);
  add_lists(task, sweep);
  sweep_pages(task, sweep, tile, arena);
  finish(task, tile);
}

AttendTile Attention::make_tile(const Task& task, Arena& arena) const {
  AttendTile tile;
  const auto lanes = static_cast<size_t>(task.num_rows * group_);
  tile.num_lanes = lanes;
  tile.key_dim = static_cast<size_t>(params_.kv.key_dim);
  tile.value_dim = static_cast<size_t>(params_.kv.value_dim);
  tile.padded_dim = static_cast<size_t>(padded_dim_);
  tile.dtype = params_.kv.dtype;
  tile.scale = params_.scale;
  tile.soft_cap = params_.soft_cap;
  tile.queries = arena.take<const float*>(lanes);
  tile.maximum = arena.take<float>(lanes);
  tile.sum = arena.take<float>(lanes);
  tile.rescale = arena.take<float>(lanes);
  if (params_.out != nullptr) {
    tile.accumulator = arena.take<float>(lanes * tile.padded_dim);
  }
  tile.query_words = arena.take<float>(lanes * tile.key_dim);
  tile.packed_keys = arena.take<float>(tile.key_dim * kPageTokens);
  tile.packed_values = arena.take<float>(tile.padded_dim * kPageTokens);
  tile.widened = arena.take<float>(tile.key_dim * kPageTokens);
  tile.weights = arena.take<float>(lanes * kPageTokens);
  tile.weight_words = arena.take<float>(lanes * kPageTokens / 2);
  tile.pointers = arena.take<const float*>(2 * lanes);
  for (size_t lane = 0; lane < lanes; ++lane) {
    const int64_t row = task.first_row + static_cast<int64_t>(lane) / group_;
    const int64_t query_row = params_.row_query == nullptr ? row : params_.row_query[row];
    const int64_t head = task.kv_head * group_ + static_cast<int64_t>(lane) % group_;
    tile.queries[lane] =
        params_.query + (query_row * params_.num_query_heads + head) * params_.kv.key_dim;
  }
  return tile;
}

void Attention::add_lists(const Task& task, PageSweep& sweep) const {
  const int64_t per_row = params_.num_selection_heads;
  sweep.clear();
  for (int64_t row = task.first_row; row < task.first_row + task.num_rows; ++row) {
    for (int64_t list = 0; list < lists_per_row_; ++list) {
      const int64_t head = task.kv_head * group_ + list;
      const int64_t index = row * per_row + head * per_row / params_.num_query_heads;
      sweep.add_list(params_.spans + params_.span_offsets[index],
                     params_.spans + params_.span_offsets[index + 1],
                     task.first_page);
    }
  }
}

void Attention::sweep_pages(const Task& task,
                            PageSweep& sweep,
                            AttendTile& tile,
                            Arena& arena) const {
  auto* lanes = arena.take<int32_t>(tile.num_lanes);
  auto* masks = arena.take<uint64_t>(tile.num_lanes);
  const auto lanes_per_list = static_cast<int32_t>(group_ / lists_per_row_);
  sweep.start();
  while (sweep.page() < task.end_page) {
    const int64_t first_entry = sweep.page() * kPageTokens;
    AttendPage page;
    page.keys = params_.kv.key(first_entry, task.kv_head);
    page.values = params_.kv.value(first_entry, task.kv_head);
    page.num_tokens =
        static_cast<size_t>(std::min<int64_t>(kPageTokens, params_.kv.num_entries - first_entry));
    page.lanes = lanes;
    page.masks = masks;
    for (size_t list = 0; list < sweep.num_lists(); ++list) {
      const uint64_t mask = sweep.mask(list);
      for (int32_t i = 0; mask != 0 && i < lanes_per_list; ++i) {
        lanes[page.num_active] = static_cast<int32_t>(list) * lanes_per_list + i;
        masks[page.num_active] = mask;
        ++page.num_active;
      }
    }
    sweep.advance();
    const int64_t next_entry =
        sweep.page() < task.end_page ? sweep.page() * kPageTokens : first_entry;
    page.next_keys = params_.kv.key(next_entry, task.kv_head);
    page.next_values = params_.kv.value(next_entry, task.kv_head);
    machine_.target.attend_page(tile, page);
  }
}

// Accumulators to outputs, or to this task's part of them.
void Attention::finish(const Task& task, const AttendTile& tile) const {
  const auto num_lanes = static_cast<int64_t>(tile.num_lanes);
  const int64_t dim = params_.kv.value_dim;
  for (int64_t lane = 0; lane < num_lanes; ++lane) {
    const float sum = tile.sum[lane];
    const bool partial = task.num_parts > 1;
    const int64_t place = partial ? task.part * num_lanes + lane : out_lane(task, lane);
    float* lse = partial ? task.part_lse : params_.lse;
    lse[place] =
        sum == 0.0F ? -std::numeric_limits<float>::infinity() : tile.maximum[lane] + std::log(sum);
    if (tile.accumulator == nullptr) {
      continue;
    }
    const float* accumulator = tile.accumulator + lane * padded_dim_;
    float* out = (partial ? task.part_out : params_.out) + place * dim;
    const float inverse = 1.0F / sum;
    for (int64_t channel = 0; channel < dim; ++channel) {
      out[channel] = sum == 0.0F ? 0.0F : accumulator[channel] * inverse;
    }
  }
}

// The heads of a row lie together in the outputs and in each part.
void Attention::merge_parts(const Task& first) const {
  const int64_t num_lanes = first.num_rows * group_;
  const int64_t dim = params_.out == nullptr ? 0 : params_.kv.value_dim;
  const auto num_parts = static_cast<size_t>(first.num_parts);
  std::vector<const float*> part_out(num_parts);
  std::vector<const float*> part_lse(num_parts);
  for (int64_t row = 0; row < first.num_rows; ++row) {
    for (size_t part = 0; part < num_parts; ++part) {
      const int64_t place = static_cast<int64_t>(part) * num_lanes + row * group_;
      part_out[part] = first.part_out + place * dim;
      part_lse[part] = first.part_lse + place;
    }
    const int64_t place = out_lane(first, row * group_);
    MergeParams merge;
    merge.num_parts = static_cast<int>(num_parts);
    merge.part_out = part_out.data();
    merge.part_lse = part_lse.data();
    merge.num_rows = group_;
    merge.value_dim = static_cast<int>(dim);
    merge.out = params_.out == nullptr ? nullptr : params_.out + place * dim;
    merge.lse = params_.lse + place;
    machine_.target.merge_rows(merge, 0, group_);
  }
}

}  // namespace

Status attend(const AttendParams& params, Machine& machine) {
  return Attention(params, machine).run();
}

}  // namespace longspan::simd
