// What differs between instruction sets: a table of functions for each, over the plain structs
// below. Everything else (lists, tasks, threads) is compiled once, for any x86-64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"

#include "kernels/params.h"

namespace longspan::simd {

// Rows of packed values and accumulators are padded to this many floats.
inline constexpr size_t kValuePadding = 16;

// Some query heads of one KV head ("lanes": rows times heads of the group) on their way through the
// keys, with an online softmax. The memory is the caller's, aligned to 64 bytes.
struct AttendTile {
  size_t num_lanes = 0;
  size_t key_dim = 0;     // D
  size_t value_dim = 0;   // E
  size_t padded_dim = 0;  // E rounded up to kValuePadding
  DataType dtype = DataType::kFloat32;
  float scale = 1.0F;
  float soft_cap = 0.0F;

  // [num_lanes] -> [D]
  const float** queries = nullptr;

  // The state: weights relative to the largest logit so far.
  float* maximum = nullptr;      // [num_lanes]
  float* sum = nullptr;          // [num_lanes]
  float* accumulator = nullptr;  // [num_lanes][padded_dim]; null: only maximum and sum are wanted

  // Scratch of the target. query_words: queries as pairs of bf16, in two terms.
  float* query_words = nullptr;      // [2][num_lanes][D / 2]
  float* packed_keys = nullptr;      // [D][64]
  float* packed_values = nullptr;    // [64][padded_dim]
  float* widened = nullptr;          // [64][D]
  float* weights = nullptr;          // [num_lanes][64]
  float* weight_words = nullptr;     // [num_lanes][32]
  float* rescale = nullptr;          // [num_lanes]
  const float** pointers = nullptr;  // [2][num_lanes]
  size_t num_query_terms = 1;        // of query_words; set by begin_tile
};

// One page of one KV head, and the lanes that see some of it.
struct AttendPage {
  const std::byte* keys = nullptr;    // [64][D]
  const std::byte* values = nullptr;  // [64][E]
  // The ones that come next, which are asked for meanwhile but not read.
  const std::byte* next_keys = nullptr;
  const std::byte* next_values = nullptr;
  size_t num_tokens = 0;  // those that exist
  size_t num_active = 0;
  const int32_t* lanes = nullptr;   // [num_active]
  const uint64_t* masks = nullptr;  // [num_active] bit i: sees token i; never empty
};

// How the heads of one score list are joined.
enum class HeadJoin : uint8_t { kNone, kSum, kMax };

// Queries of some rows that are scored against pages of entries.
struct ScoreTile {
  size_t num_heads = 0;  // of one row and one KV head
  size_t key_dim = 0;    // D
  DataType dtype = DataType::kFloat32;
  bool bound = false;  // score by minima and maxima
  HeadJoin join = HeadJoin::kNone;

  // Probabilities instead of scores: exp(logit(scale, soft_cap) - lse).
  bool softmax = false;
  float scale = 1.0F;
  float soft_cap = 0.0F;

  float* packed = nullptr;    // scratch [D or 2 D][64]
  float* widened = nullptr;   // scratch [64][D]
  float* products = nullptr;  // scratch [rows * num_heads][64]
};

// One page of entries of one KV head, for the rows that may select from it.
struct ScorePage {
  const std::byte* keys = nullptr;    // [64][D]; minima when bound
  const std::byte* values = nullptr;  // maxima when bound
  // The ones that come next, which are asked for meanwhile but not read.
  const std::byte* next_keys = nullptr;
  const std::byte* next_values = nullptr;
  size_t num_rows = 0;
  // [num_rows * num_heads] -> [D]; when bound [2 D]: negative parts, then positive parts.
  const float* const* queries = nullptr;
  const float* const* lse = nullptr;  // [num_rows] -> [num_heads], with softmax
  // [num_rows] -> [num_heads or 1][64]. kSum and kMax add to what is there; kNone overwrites it.
  float* const* scores = nullptr;
};

// Dot products of some keys with the query heads of their KV head.
struct AnchorScores {
  const PagedView* view = nullptr;
  int kv_head = 0;
  size_t num_heads = 0;
  const float* queries = nullptr;   // [num_heads][D]
  const int64_t* tokens = nullptr;  // [num_tokens]
  size_t num_tokens = 0;
  float* scores = nullptr;  // [num_heads][num_tokens]
};

// Elementwise over rows of one page and KV head, in row order.
enum class Pooling : uint8_t { kSum, kWeightedSum, kExtremes };
struct PoolRows {
  Pooling pooling = Pooling::kSum;
  DataType dtype = DataType::kFloat32;
  const std::byte* rows = nullptr;  // [num_rows][dim]
  size_t num_rows = 0;
  size_t dim = 0;
  const float* weights = nullptr;  // [num_rows], for kWeightedSum
  float* state = nullptr;          // [dim]: the sum, or the minima
  float* maxima = nullptr;         // [dim], for kExtremes
};

struct Target {
  absl::string_view name;    // as $LONGSPAN_SIMD_TARGET has it
  absl::string_view detail;  // for people

  void (*begin_tile)(AttendTile& tile);
  void (*attend_page)(AttendTile& tile, const AttendPage& page);
  void (*score_page)(const ScoreTile& tile, const ScorePage& page);
  // Bit i: scores[i] > threshold.
  uint64_t (*above)(const float* scores, float threshold);  // [64]
  void (*score_anchors)(const AnchorScores& anchors);
  void (*pool_rows)(const PoolRows& pool);
  void (*merge_rows)(const MergeParams& params, int64_t begin, int64_t end);
};

const Target& avx2_target();
const Target& avx512_target();
const Target& avx512_bf16_target();

// The best one that this machine runs, or the one that $LONGSPAN_SIMD_TARGET names if it runs here;
// null when there is none.
const Target* choose_target();

}  // namespace longspan::simd
