// How the fused search of Hopper is cut: pure functions of plain data, without CUDA headers, tested
// where there is no device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/data_type.h"
#include "kernels/cuda/device_info.h"

namespace longspan::cuda {

enum class ScoreForm : uint8_t {
  kDot,
  kBound,  // sum over channels of max(q min, q max)
};

// The vectors that summaries are scored with. Without a reduction one for each query head. Heads
// whose scores are summed are added up before they are scored: dot products are linear in the
// query, and bounds in its positive and negative parts.
enum class QueryForm : uint8_t { kEachHead, kGroupSum, kGroupMean, kAllMean };

// How the scores of several vectors make one list: not at all, by sum or by maximum.
enum class ScoreJoin : uint8_t { kNone, kSum, kMax };

// What is searched, as far as the host knows it. T rows, H query heads, G KV heads, D channels; S
// lists of a row.
struct SearchShape {
  int64_t num_rows = 0;  // T
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int dim = 0;              // D
  int64_t num_entries = 0;  // summaries of the shard
  int64_t max_k = 0;
  DataType dtype = DataType::kBFloat16;  // of the summaries
  DataType query_dtype = DataType::kFloat32;

  ScoreForm score = ScoreForm::kDot;
  QueryForm query_form = QueryForm::kEachHead;
  ScoreJoin join = ScoreJoin::kNone;
  bool join_all_heads = false;  // over all KV heads; otherwise over the vectors of one
  float divisor = 1.0F;         // of a joined score: what makes a sum a mean

  constexpr int group() const { return num_query_heads / num_kv_heads; }
  // Vectors of a row and KV head.
  constexpr int vectors() const { return query_form == QueryForm::kEachHead ? group() : 1; }
  // KV heads whose scores end in the same lists are a set.
  constexpr int num_sets() const { return join_all_heads ? 1 : num_kv_heads; }
  constexpr int kv_heads_per_set() const { return join_all_heads ? num_kv_heads : 1; }
  // Lists of a row and set.
  constexpr int lists() const { return join == ScoreJoin::kNone ? vectors() : 1; }
  constexpr int planes() const { return score == ScoreForm::kBound ? 2 : 1; }
};

// Decode: threads of a block, and entries that it scores before it selects among them.
inline constexpr int kSearchDecodeWarps = 16;
inline constexpr int kSearchRoundEntries = 1024;
// Decode: for the limits of a block's rows in shared memory.
inline constexpr int kSearchLimitBytes = 12 * kSearchDecodeWarps;
// Decode: vectors that are scored in one pass over a tile in registers.
constexpr int search_vectors_per_pass(int64_t num_vectors) { return num_vectors == 1 ? 1 : 4; }
// Prefill: rows of a tile, in four warps; summaries of a stage, and stages on their way; summaries
// that are taken into the rows' buffers at once.
inline constexpr int kSearchTileRows = 64;
inline constexpr int kSearchStageEntries = 64;
inline constexpr int kSearchPrefillStages = 2;
inline constexpr int kSearchStepEntries = 32;
// Prefill: candidates that a row gathers before its threshold is raised. Eight rows that begin so
// far apart are read without conflicts of banks.
constexpr int search_buffer_places(int list_registers) {
  return list_registers == 1 ? 76 : list_registers == 2 ? 124 : 252;
}

struct SearchPlan {
  bool supported = false;  // otherwise the portable search has to do it
  bool prefill = false;
  int list_registers = 0;  // a list has places for 32 times as many candidates

  int rows_per_block = 0;
  // Decode. A block has the lists of some rows in one set, and one share of the entries.
  int vectors_per_block = 0;  // of each row; all of them, unless they are more than fit
  int num_splits = 0;         // shares of the entries
  int share_entries = 0;
  int64_t num_groups = 0;  // of blocks that have the same lists

  // Prefill. The rows of a tile are some rows with all their lists of one KV head.
  int num_terms = 0;  // 16-bit numbers whose sum is a query's element: 1 or 3

  int64_t num_blocks = 0;
  size_t shared_bytes = 0;
  size_t workspace_bytes = 0;
  int64_t num_tickets = 0;
};

SearchPlan plan_search_topk(const SearchShape& shape, const DeviceInfo& device);

}  // namespace longspan::cuda
