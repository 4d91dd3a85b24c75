// Raw scores of single keys: each row has a list of its own, so rows share nothing.
#include <algorithm>

#include "kernels/simd/search_tile.h"

namespace longspan::simd {
namespace {

// Anchors that are scored before they are offered.
constexpr int64_t kAnchorsAtOnce = 512;

// Scores [num_heads][count] of one KV head into the list scores [lists][kAnchorsAtOnce].
void join_scores(
    HeadJoin join, int64_t num_heads, int64_t count, const float* scores, float* lists) {
  for (int64_t head = 0; head < num_heads; ++head) {
    const float* from = scores + head * count;
    float* to = join == HeadJoin::kNone ? lists + head * kAnchorsAtOnce : lists;
    for (int64_t i = 0; i < count; ++i) {
      switch (join) {
        case HeadJoin::kNone:
          to[i] = from[i];
          break;
        case HeadJoin::kSum:
          to[i] += from[i];
          break;
        case HeadJoin::kMax:
          to[i] = from[i] > to[i] ? from[i] : to[i];
          break;
      }
    }
  }
}

void search_row(SearchTile& tile, int64_t row, float* scores, float* lists) {
  const SearchParams& params = tile.params();
  const SearchShape& shape = tile.shape();
  const int64_t* tokens = params.candidates + params.candidate_offsets[tile.task().first_row + row];
  const int64_t* end =
      params.candidates + params.candidate_offsets[tile.task().first_row + row + 1];
  const float before = shape.join == HeadJoin::kMax ? -std::numeric_limits<float>::infinity() : 0;
  for (; tokens < end; tokens += kAnchorsAtOnce) {
    const int64_t count = std::min<int64_t>(kAnchorsAtOnce, end - tokens);
    std::fill_n(lists, shape.lists_per_set * kAnchorsAtOnce, before);
    for (int64_t kv_head = 0; kv_head < shape.kv_heads_per_set; ++kv_head) {
      AnchorScores anchors;
      anchors.view = &params.view;
      anchors.kv_head = static_cast<int>(tile.first_kv_head() + kv_head);
      anchors.num_heads = static_cast<size_t>(shape.num_heads);
      anchors.queries = tile.query(row, kv_head, 0);
      anchors.tokens = tokens;
      anchors.num_tokens = static_cast<size_t>(count);
      anchors.scores = scores;
      tile.target().score_anchors(anchors);
      join_scores(shape.join, shape.num_heads, count, scores, lists);
    }
    for (int64_t list = 0; list < shape.lists_per_set; ++list) {
      TopK& best = tile.best(row, list);
      for (int64_t i = 0; i < count; ++i) {
        const float score = lists[list * kAnchorsAtOnce + i] / shape.mean_divisor;
        if (!best.full() || score > best.threshold()) {
          best.offer(score, tokens[i]);
        }
      }
    }
  }
}

}  // namespace

size_t search_anchors_bytes(const SearchParams& /*params*/,
                            const SearchShape& shape,
                            int64_t /*num_rows*/) {
  return static_cast<size_t>((shape.num_heads + shape.lists_per_set) * kAnchorsAtOnce) *
         sizeof(float);
}

void search_anchors(SearchTile& tile) {
  const SearchShape& shape = tile.shape();
  auto* scores = tile.arena().take<float>(static_cast<size_t>(shape.num_heads * kAnchorsAtOnce));
  auto* lists = tile.arena().take<float>(static_cast<size_t>(shape.lists_per_set * kAnchorsAtOnce));
  for (int64_t row = 0; row < tile.task().num_rows; ++row) {
    search_row(tile, row, scores, lists);
  }
}

}  // namespace longspan::simd
