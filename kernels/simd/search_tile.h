// The shape of a search, and one task of it: some rows, some KV heads, a range of candidates.
#pragma once

#include <cstdint>

#include "kernels/params.h"
#include "kernels/simd/stages.h"
#include "kernels/simd/top_k.h"

namespace longspan::simd {

// What follows from the parameters and is the same for all tasks. A "set" is the KV heads whose
// scores end in the same selection lists: all of them under an all-heads reduction, else one.
struct SearchShape {
  explicit SearchShape(const SearchParams& params);

  int64_t group;      // query heads of a KV head
  int64_t num_heads;  // scored heads of a row and KV head, after query_reduce
  int64_t query_dim;  // of a prepared query: D, or 2 D for bounds
  HeadJoin join;
  int64_t kv_heads_per_set;
  int64_t num_sets;
  int64_t lists_per_set;
  float mean_divisor;  // of a joined score: 1 unless it is a mean
};

struct SearchTask {
  int64_t first_row = 0;
  int64_t num_rows = 0;
  int64_t set = 0;
  // Candidate blocks of this task; anchors are not divided.
  int64_t begin = 0;
  int64_t end = 0;
  int64_t part = 0;
  int64_t num_parts = 1;
  // With several parts, what this one found: [rows][lists_per_set][max_k], and how many.
  uint64_t* part_candidates = nullptr;
  int64_t* part_counts = nullptr;
};

// The rows of a task while they are scored: prepared queries and the best candidates so far. Its
// memory is the arena's.
class SearchTile {
 public:
  SearchTile(const SearchParams& params,
             const SearchShape& shape,
             const SearchTask& task,
             const Target& target,
             Arena& arena);
  // What the constructor takes, for tasks of at most `num_rows` rows, without score_* scratch.
  static size_t arena_bytes(const SearchParams& params, const SearchShape& shape, int64_t num_rows);
  static constexpr size_t kArenaTakes = 4;

  const SearchParams& params() const { return params_; }
  const SearchShape& shape() const { return shape_; }
  const SearchTask& task() const { return task_; }
  const Target& target() const { return target_; }
  Arena& arena() { return arena_; }

  // kv_head counts within the set; rows within the task.
  const float* query(int64_t row, int64_t kv_head, int64_t head) const {
    return queries_[(row * shape_.kv_heads_per_set + kv_head) * shape_.num_heads + head];
  }
  int64_t first_kv_head() const { return task_.set * shape_.kv_heads_per_set; }
  TopK& best(int64_t row, int64_t list) { return best_[row * shape_.lists_per_set + list]; }
  // Offers the candidates [first, first + 64) of `mask` by their joined scores [64].
  void offer_page(
      int64_t row, int64_t list, const float* scores, uint64_t mask, int64_t first_candidate);

  // Sorted into the results, or left as a part.
  void finish();

 private:
  void prepare_queries();
  void reduce_query(int64_t row, int64_t kv_head, int64_t head, float* out) const;

  const SearchParams& params_;
  const SearchShape& shape_;
  const SearchTask& task_;
  const Target& target_;
  Arena& arena_;
  const float** queries_;  // [rows][kv heads of the set][num_heads] -> [query_dim]
  TopK* best_;             // [rows][lists_per_set]
};

// Writes a finished list to its place in the results.
void store_candidates(const SearchParams& params,
                      int64_t num_lists,
                      int64_t row,
                      int64_t list,
                      const uint64_t* candidates,
                      int64_t count);

// Scratch of a page of scores for up to `num_rows` rows.
struct ScoreScratch {
  static size_t arena_bytes(const SearchShape& shape, int64_t key_dim, int64_t num_rows);
  static constexpr size_t kArenaTakes = 6;

  ScoreScratch(SearchTile& tile, DataType dtype);

  ScoreTile score;
  const float** queries;  // [rows * num_heads]
  const float** lse;      // [rows]
  float** scores;         // [rows]
};

// The three ways to score.
void search_blocks(SearchTile& tile);
size_t search_blocks_bytes(const SearchParams& params, const SearchShape& shape, int64_t num_rows);
void search_importance(SearchTile& tile);
size_t search_importance_bytes(const SearchParams& params,
                               const SearchShape& shape,
                               int64_t num_rows);
void search_anchors(SearchTile& tile);
size_t search_anchors_bytes(const SearchParams& params, const SearchShape& shape, int64_t num_rows);
// Takes of the arena by any of them, SearchTile and ScoreScratch included.
inline constexpr size_t kSearchArenaTakes = 16;

}  // namespace longspan::simd
