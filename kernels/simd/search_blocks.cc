// Raw scores: one entry a block, 64 entries at a time for all rows that may select from them.
#include <algorithm>

#include "kernels/simd/search_tile.h"

namespace longspan::simd {
namespace {

// Bits [begin, end) of a page that starts at `first`.
uint64_t range_mask(int64_t begin, int64_t end, int64_t first) {
  const int64_t low = std::max<int64_t>(begin - first, 0);
  const int64_t high = std::min<int64_t>(end - first, kPageTokens);
  return low < high ? (~uint64_t{0} >> (kPageTokens - (high - low))) << low : 0;
}

}  // namespace

size_t search_blocks_bytes(const SearchParams& params, const SearchShape& shape, int64_t num_rows) {
  const auto scores = static_cast<size_t>(num_rows * shape.lists_per_set * kPageTokens);
  const auto rows = static_cast<size_t>(num_rows);
  return ScoreScratch::arena_bytes(shape, params.view.key_dim, num_rows) + scores * sizeof(float) +
         rows * (sizeof(int64_t) + sizeof(uint64_t));
}

void search_blocks(SearchTile& tile) {
  const SearchParams& params = tile.params();
  const SearchShape& shape = tile.shape();
  const SearchTask& task = tile.task();
  ScoreScratch scratch(tile, params.view.dtype);
  const auto num_rows = static_cast<size_t>(task.num_rows);
  const auto row_floats = static_cast<size_t>(shape.lists_per_set * kPageTokens);
  auto* scores = tile.arena().take<float>(num_rows * row_floats);
  auto* rows = tile.arena().take<int64_t>(num_rows);
  auto* masks = tile.arena().take<uint64_t>(num_rows);
  const float before = shape.join == HeadJoin::kMax ? -std::numeric_limits<float>::infinity() : 0;

  for (int64_t first = task.begin / kPageTokens * kPageTokens; first < task.end;
       first += kPageTokens) {
    ScorePage page;
    for (int64_t row = 0; row < task.num_rows; ++row) {
      const uint64_t mask =
          range_mask(std::max(task.begin, params.candidate_begin[task.first_row + row]),
                     std::min(task.end, params.candidate_end[task.first_row + row]),
                     first);
      if (mask != 0) {
        rows[page.num_rows] = row;
        masks[page.num_rows] = mask;
        scratch.scores[page.num_rows] = scores + page.num_rows * row_floats;
        ++page.num_rows;
      }
    }
    if (page.num_rows == 0) {
      continue;
    }
    std::fill_n(scores, page.num_rows * row_floats, before);
    page.queries = scratch.queries;
    page.scores = scratch.scores;
    for (int64_t kv_head = 0; kv_head < shape.kv_heads_per_set; ++kv_head) {
      for (size_t i = 0; i < page.num_rows * scratch.score.num_heads; ++i) {
        scratch.queries[i] = tile.query(rows[i / scratch.score.num_heads],
                                        kv_head,
                                        static_cast<int64_t>(i % scratch.score.num_heads));
      }
      const int head = static_cast<int>(tile.first_kv_head() + kv_head);
      page.keys = params.view.key(first, head);
      page.values = params.view.value(first, head);
      const int64_t next = first + kPageTokens < task.end ? first + kPageTokens : first;
      page.next_keys = params.view.key(next, head);
      page.next_values = params.view.value(next, head);
      tile.target().score_page(scratch.score, page);
    }
    for (size_t i = 0; i < page.num_rows; ++i) {
      for (int64_t list = 0; list < shape.lists_per_set; ++list) {
        tile.offer_page(rows[i], list, scratch.scores[i] + list * kPageTokens, masks[i], first);
      }
    }
  }
}

}  // namespace longspan::simd
