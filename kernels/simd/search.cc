// Scoring fused with top-k: a task scores a tile of rows against a range of candidates and keeps
// only the best. Where rows are few (decode) the candidates are dealt to several tasks.
#include <algorithm>
#include <vector>

#include "base/checked.h"
#include "kernels/params.h"
#include "kernels/simd/search_tile.h"

namespace longspan::simd {
namespace {

// Scored heads of a tile: enough to pay for packing a page of entries.
constexpr int64_t kTileLanes = 96;
// Bytes of candidates a tile may hold, so that they stay in the second-level cache.
constexpr int64_t kTileCandidateBytes = int64_t{1} << 19;
constexpr int64_t kTasksPerThread = 4;
// Candidates that a task of its own is worth.
constexpr int64_t kMinTaskCandidates = 512;

class Search {
 public:
  Search(const SearchParams& params, Machine& machine)
      : params_(params), machine_(machine), shape_(params) {}

  Status run();

 private:
  bool anchors() const { return params_.spec->view == SearchView::kAnchor; }
  bool importance() const { return params_.spec->normalise == Normalise::kSoftmax; }

  void plan();
  void plan_tile(int64_t first_row, int64_t set, int64_t num_tiles);
  Status reserve();
  void search_task(const SearchTask& task, int thread);
  void merge_parts(size_t first_task, int thread);

  const SearchParams& params_;
  Machine& machine_;
  SearchShape shape_;
  int64_t tile_rows_ = 1;
  std::vector<SearchTask> tasks_;
};

void Search::plan() {
  const int64_t lists = shape_.lists_per_set;
  const int64_t row_bytes =
      lists * TopK::capacity(params_.max_k) * static_cast<int64_t>(sizeof(uint64_t));
  tile_rows_ = std::min(kTileLanes / shape_.num_heads, kTileCandidateBytes / row_bytes);
  tile_rows_ = std::clamp<int64_t>(tile_rows_, 1, std::max<int64_t>(params_.num_rows, 1));
  const int64_t num_tiles = divide_up(params_.num_rows, tile_rows_);
  for (int64_t tile = num_tiles - 1; tile >= 0; --tile) {  // later rows usually see more
    for (int64_t set = 0; set < shape_.num_sets; ++set) {
      plan_tile(tile * tile_rows_, set, num_tiles);
    }
  }
}

void Search::plan_tile(int64_t first_row, int64_t set, int64_t num_tiles) {
  SearchTask task;
  task.first_row = first_row;
  task.num_rows = std::min(tile_rows_, params_.num_rows - first_row);
  task.set = set;
  if (anchors()) {
    tasks_.push_back(task);
    return;
  }
  const int64_t* begins = params_.candidate_begin + first_row;
  const int64_t* ends = params_.candidate_end + first_row;
  const int64_t begin = *std::min_element(begins, begins + task.num_rows);
  const int64_t end = std::max(begin, *std::max_element(ends, ends + task.num_rows));
  const int64_t num_threads = machine_.pool.num_threads();
  const int64_t wanted =
      num_threads == 1 ? 1 : divide_up(kTasksPerThread * num_threads, num_tiles * shape_.num_sets);
  task.num_parts = std::clamp<int64_t>((end - begin) / kMinTaskCandidates, 1, wanted);
  for (task.part = 0; task.part < task.num_parts; ++task.part) {
    task.begin = begin + (end - begin) * task.part / task.num_parts;
    task.end = begin + (end - begin) * (task.part + 1) / task.num_parts;
    tasks_.push_back(task);
  }
}

Status Search::reserve() {
  const auto scratch_bytes = anchors()      ? search_anchors_bytes
                             : importance() ? search_importance_bytes
                                            : search_blocks_bytes;
  const size_t bytes = SearchTile::arena_bytes(params_, shape_, tile_rows_) +
                       scratch_bytes(params_, shape_, tile_rows_);
  for (Arena& arena : machine_.arenas) {
    LONGSPAN_RETURN_IF_ERROR(arena.reserve(bytes, kSearchArenaTakes));
  }
  const auto max_k = static_cast<size_t>(params_.max_k);
  size_t part_lists = 0;
  for (const SearchTask& task : tasks_) {
    part_lists +=
        task.num_parts > 1 ? static_cast<size_t>(task.num_rows * shape_.lists_per_set) : 0;
  }
  LONGSPAN_RETURN_IF_ERROR(machine_.shared.reserve(
      part_lists * (max_k * sizeof(uint64_t) + sizeof(int64_t)), 2 * tasks_.size()));
  for (SearchTask& task : tasks_) {
    if (task.num_parts > 1) {
      const auto lists = static_cast<size_t>(task.num_rows * shape_.lists_per_set);
      task.part_candidates = machine_.shared.take<uint64_t>(lists * max_k);
      task.part_counts = machine_.shared.take<int64_t>(lists);
    }
  }
  return absl::OkStatus();
}

Status Search::run() {
  plan();
  LONGSPAN_RETURN_IF_ERROR(reserve());
  const auto num_tasks = static_cast<int64_t>(tasks_.size());
  machine_.pool.run(num_tasks, [this](int64_t index, int thread) {
    search_task(tasks_[static_cast<size_t>(index)], thread);
  });
  for (size_t i = 0; i < tasks_.size(); i += static_cast<size_t>(tasks_[i].num_parts)) {
    if (tasks_[i].num_parts > 1) {
      merge_parts(i, /*thread=*/0);
    }
  }
  return absl::OkStatus();
}

void Search::search_task(const SearchTask& task, int thread) {
  Arena& arena = machine_.arenas[static_cast<size_t>(thread)];
  arena.reset();
  SearchTile tile(params_, shape_, task, machine_.target, arena);
  if (anchors()) {
    search_anchors(tile);
  } else if (importance()) {
    search_importance(tile);
  } else {
    search_blocks(tile);
  }
  tile.finish();
}

void Search::merge_parts(size_t first_task, int thread) {
  const SearchTask& first = tasks_[first_task];
  Arena& arena = machine_.arenas[static_cast<size_t>(thread)];
  arena.reset();
  auto* places = arena.take<uint64_t>(static_cast<size_t>(TopK::capacity(params_.max_k)));
  for (int64_t list = 0; list < first.num_rows * shape_.lists_per_set; ++list) {
    const int64_t row = first.first_row + list / shape_.lists_per_set;
    TopK best;
    best.start(params_.k[row], places);
    for (int64_t part = 0; part < first.num_parts; ++part) {
      const SearchTask& task = tasks_[first_task + static_cast<size_t>(part)];
      const uint64_t* candidates = task.part_candidates + list * params_.max_k;
      std::for_each(candidates, candidates + task.part_counts[list], [&](uint64_t candidate) {
        best.offer(candidate);
      });
    }
    best.finish();
    store_candidates(params_,
                     shape_.num_sets * shape_.lists_per_set,
                     row,
                     first.set * shape_.lists_per_set + list % shape_.lists_per_set,
                     best.candidates(),
                     best.count());
  }
}

}  // namespace

Status search(const SearchParams& params, Machine& machine) {
  return Search(params, machine).run();
}

}  // namespace longspan::simd
