// NSA's importance: probabilities of compressed windows, summed over the windows that overlap a
// block with weight overlap / stride. The probabilities of a run of blocks are kept, then summed.
#include <algorithm>

#include "base/checked.h"
#include "kernels/simd/search_tile.h"

namespace longspan::simd {
namespace {

// Windows whose probabilities are kept at once, about.
constexpr int64_t kWindowsAtOnce = 1024;

// Windows at most, with and without the halo, that a run of blocks needs; in whole pages.
struct RunSize {
  explicit RunSize(const SearchParams& params) {
    const SummarySpec& summary = *params.summary;
    windows_before = summary.window_tokens / summary.stride_tokens - 1;
    const int64_t per_block = std::max<int64_t>(1, params.block_tokens / summary.stride_tokens);
    blocks = std::max<int64_t>(1, kWindowsAtOnce / per_block);
    pages = (blocks * per_block + windows_before) / kPageTokens + 2;
    halo_pages = blocks * windows_before / kPageTokens + 2;
  }
  int64_t windows_before;  // of a stripe, in the halo
  int64_t blocks;
  int64_t pages;
  int64_t halo_pages;
};

// Probabilities of entries [first_page * 64, ...) of a view for the rows of a task, joined over
// heads where that is a sum: [rows][pages][heads][64].
class Probabilities {
 public:
  // Where heads are not summed, each has its own.
  static int64_t heads_kept(const SearchShape& shape) {
    return shape.join == HeadJoin::kSum ? 1 : shape.num_heads * shape.kv_heads_per_set;
  }
  static size_t arena_bytes(const SearchShape& shape, int64_t num_rows, int64_t num_pages) {
    return static_cast<size_t>(num_rows * num_pages * heads_kept(shape) * kPageTokens) *
           sizeof(float);
  }

  Probabilities(SearchTile& tile, const PagedView& view, ScoreScratch& scratch, int64_t num_pages)
      : tile_(tile),
        view_(view),
        scratch_(scratch),
        num_pages_(num_pages),
        heads_kept_(heads_kept(tile.shape())),
        data_(tile.arena().take<float>(
            static_cast<size_t>(tile.task().num_rows * num_pages * heads_kept_ * kPageTokens))) {}

  float at(int64_t row, int64_t head, int64_t entry) const {
    return *place(row, head, entry / kPageTokens - first_page_, entry % kPageTokens);
  }

  // Entries [begin, end) for `rows`.
  void compute(const int64_t* rows, size_t num_rows, int64_t begin, int64_t end) {
    first_page_ = begin / kPageTokens;
    for (int64_t page = 0; (first_page_ + page) * kPageTokens < end; ++page) {
      compute_page(rows, num_rows, page, (first_page_ + page + 1) * kPageTokens < end);
    }
  }

 private:
  float* place(int64_t row, int64_t head, int64_t page, int64_t entry) const {
    return data_ + ((row * num_pages_ + page) * heads_kept_ + head) * kPageTokens + entry;
  }

  void compute_page(const int64_t* rows, size_t num_rows, int64_t page_index, bool has_next) {
    const SearchParams& params = tile_.params();
    const SearchShape& shape = tile_.shape();
    const auto num_heads = static_cast<size_t>(shape.num_heads);
    ScorePage page;
    page.num_rows = num_rows;
    page.queries = scratch_.queries;
    page.lse = scratch_.lse;
    page.scores = scratch_.scores;
    for (int64_t kv_head = 0; kv_head < shape.kv_heads_per_set; ++kv_head) {
      const int64_t head = tile_.first_kv_head() + kv_head;
      for (size_t i = 0; i < num_rows; ++i) {
        for (size_t j = 0; j < num_heads; ++j) {
          scratch_.queries[i * num_heads + j] =
              tile_.query(rows[i], kv_head, static_cast<int64_t>(j));
        }
        scratch_.lse[i] = params.lse + (tile_.task().first_row + rows[i]) * params.num_query_heads +
                          head * shape.group;
        const bool summed = heads_kept_ == 1;
        scratch_.scores[i] = place(rows[i], summed ? 0 : kv_head * shape.num_heads, page_index, 0);
        if (summed && kv_head == 0) {
          std::fill_n(scratch_.scores[i], kPageTokens, 0.0F);
        }
      }
      const int64_t first = (first_page_ + page_index) * kPageTokens;
      page.keys = view_.key(first, static_cast<int>(head));
      page.next_keys = view_.key(has_next ? first + kPageTokens : first, static_cast<int>(head));
      tile_.target().score_page(scratch_.score, page);
    }
  }

  SearchTile& tile_;
  const PagedView& view_;
  ScoreScratch& scratch_;
  int64_t num_pages_;
  int64_t heads_kept_;
  float* data_;
  int64_t first_page_ = 0;
};

class ImportanceSearch {
 public:
  explicit ImportanceSearch(SearchTile& tile)
      : tile_(tile),
        params_(tile.params()),
        size_(tile.params()),
        scratch_(tile, tile.params().view.dtype),
        windows_(tile, tile.params().view, scratch_, size_.pages),
        halo_(tile, tile.params().halo, scratch_, size_.halo_pages),
        rows_(tile.arena().take<int64_t>(static_cast<size_t>(tile.task().num_rows))) {
    // Heads that are kept apart are joined here, after the sum over windows.
    scratch_.score.join = scratch_.score.join == HeadJoin::kSum ? HeadJoin::kSum : HeadJoin::kNone;
  }

  void run() {
    for (int64_t block = tile_.task().begin; block < tile_.task().end; block += size_.blocks) {
      run_blocks(block, std::min(block + size_.blocks, tile_.task().end));
    }
  }

 private:
  int64_t stripe_of(int64_t block) const {
    return params_.stripe_tokens > 0 ? block * params_.block_tokens / params_.stripe_tokens : 0;
  }
  bool has_halo(int64_t stripe) const {
    return params_.halo.pages != nullptr && size_.windows_before > 0 &&
           !(params_.starts_context && stripe == 0);
  }

  void run_blocks(int64_t begin, int64_t end) {
    const SearchTask& task = tile_.task();
    size_t num_rows = 0;
    int64_t visible = 0;
    for (int64_t row = 0; row < task.num_rows; ++row) {
      const int64_t index = task.first_row + row;
      if (params_.candidate_begin[index] < end && begin < params_.candidate_end[index]) {
        rows_[num_rows++] = row;
        visible = std::max(visible, params_.visible_entries[index]);
      }
    }
    if (num_rows == 0) {
      return;
    }
    const int64_t stride = params_.summary->stride_tokens;
    const int64_t first_window =
        std::max<int64_t>(0, (begin * params_.block_tokens) / stride - size_.windows_before);
    const int64_t end_window = std::min(visible, end * params_.block_tokens / stride);
    windows_.compute(rows_, num_rows, first_window, end_window);
    const int64_t first_stripe = has_halo(stripe_of(begin)) ? stripe_of(begin) : 1;
    const int64_t end_stripe = stripe_of(end - 1) + 1;
    if (has_halo(end_stripe - 1)) {
      halo_.compute(
          rows_, num_rows, first_stripe * size_.windows_before, end_stripe * size_.windows_before);
    }
    for (size_t i = 0; i < num_rows; ++i) {
      const int64_t index = task.first_row + rows_[i];
      const int64_t row_end = std::min(end, params_.candidate_end[index]);
      for (int64_t block = std::max(begin, params_.candidate_begin[index]); block < row_end;
           ++block) {
        offer_block(rows_[i], block);
      }
    }
  }

  void offer_block(int64_t row, int64_t block) {
    const SearchShape& shape = tile_.shape();
    const int64_t heads = Probabilities::heads_kept(shape);
    float joined = -std::numeric_limits<float>::infinity();
    for (int64_t head = 0; head < heads; ++head) {
      const float sum = sum_windows(row, head, block);
      if (shape.join == HeadJoin::kNone) {
        offer(row, head, sum, block);
      } else {
        joined = sum > joined ? sum : joined;
        joined = shape.join == HeadJoin::kSum ? sum : joined;
      }
    }
    if (shape.join != HeadJoin::kNone) {
      offer(row, 0, joined / shape.mean_divisor, block);
    }
  }

  void offer(int64_t row, int64_t list, float score, int64_t block) {
    TopK& best = tile_.best(row, list);
    if (!best.full() || score > best.threshold()) {
      best.offer(score, block);
    }
  }

  // Windows of the block's stripe start in it; those that reach into it from before are the halo's.
  float sum_windows(int64_t row, int64_t head, int64_t block) const {
    const int64_t stride = params_.summary->stride_tokens;
    const int64_t length = params_.summary->window_tokens;
    const int64_t block_begin = block * params_.block_tokens;
    const int64_t stripe = stripe_of(block);
    const int64_t stripe_begin = stripe * params_.stripe_tokens;
    float sum = 0.0F;
    for (int64_t m = 0; has_halo(stripe) && m < size_.windows_before; ++m) {
      const int64_t weight =
          overlap(stripe_begin - (size_.windows_before - m) * stride, block_begin);
      if (weight > 0) {
        sum += share(weight) * halo_.at(row, head, stripe * size_.windows_before + m);
      }
    }
    const int64_t first =
        std::max({int64_t{0},
                  stripe_begin / stride,
                  divide_up(std::max<int64_t>(0, block_begin - length + 1), stride)});
    const int64_t end = std::min(params_.visible_entries[tile_.task().first_row + row],
                                 (block_begin + params_.block_tokens) / stride);
    for (int64_t window = first; window < end; ++window) {
      sum += share(overlap(window * stride, block_begin)) * windows_.at(row, head, window);
    }
    return sum;
  }

  // Tokens that a window and a block have in common.
  int64_t overlap(int64_t window_begin, int64_t block_begin) const {
    const int64_t begin = std::max(window_begin, block_begin);
    const int64_t end =
        std::min(window_begin + params_.summary->window_tokens, block_begin + params_.block_tokens);
    return std::max<int64_t>(0, end - begin);
  }
  float share(int64_t tokens) const {
    return static_cast<float>(tokens) / static_cast<float>(params_.summary->stride_tokens);
  }

  SearchTile& tile_;
  const SearchParams& params_;
  RunSize size_;
  ScoreScratch scratch_;
  Probabilities windows_;
  Probabilities halo_;
  int64_t* rows_;  // of the task, that may select from the blocks at hand
};

}  // namespace

size_t search_importance_bytes(const SearchParams& params,
                               const SearchShape& shape,
                               int64_t num_rows) {
  const RunSize size(params);
  return ScoreScratch::arena_bytes(shape, params.view.key_dim, num_rows) +
         Probabilities::arena_bytes(shape, num_rows, size.pages) +
         Probabilities::arena_bytes(shape, num_rows, size.halo_pages) +
         static_cast<size_t>(num_rows) * sizeof(int64_t);
}

void search_importance(SearchTile& tile) { ImportanceSearch(tile).run(); }

}  // namespace longspan::simd
