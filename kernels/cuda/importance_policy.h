// How NSA's importance of blocks is cut on Hopper: pure functions of plain data, without CUDA
// headers, tested where there is no device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/data_type.h"
#include "kernels/cuda/device_info.h"

namespace longspan::cuda {

// What is scored, as far as the host knows it. T rows, H query heads, G KV heads, D channels.
struct ImportanceShape {
  int64_t num_rows = 0;  // T
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int dim = 0;              // D
  int64_t num_windows = 0;  // summaries of the shard
  int64_t max_k = 0;
  DataType dtype = DataType::kBFloat16;  // of the summaries
  DataType query_dtype = DataType::kFloat32;
  int window_tokens = 0;
  int stride_tokens = 0;
  int block_tokens = 0;
  bool mean_of_heads = false;  // otherwise their sum

  constexpr int group() const { return num_query_heads / num_kv_heads; }
  // Windows that start in a block, and those that start before it and reach into it.
  constexpr int windows_per_block() const { return block_tokens / stride_tokens; }
  constexpr int windows_before() const { return window_tokens / stride_tokens - 1; }
};

// A warpgroup has 64 columns: the query heads of some tokens. A group of heads takes 4, 8 or 16
// columns.
inline constexpr int kImportanceColumns = 64;
// Windows of a stage, and stages on their way.
inline constexpr int kImportanceWindows = 64;
inline constexpr int kImportanceStages = 3;
// The sums of heads of so many windows are kept for each token: the stage's and those before it.
inline constexpr int kImportanceRing = 2 * kImportanceWindows;
inline constexpr int kImportanceRingStride = kImportanceRing + 8;  // tokens share no banks
// Of a token's state in shared memory.
inline constexpr int kImportanceRowBytes = 32;
// Blocks that a token gathers before they are merged into its list.
inline constexpr int kImportanceBuffer = 64;

constexpr int importance_columns_per_token(int group) { return group > 8 ? 16 : group > 4 ? 8 : 4; }

struct ImportancePlan {
  // Why the portable search has to do it; null: supported.
  const char* declined = nullptr;
  int num_terms = 0;  // 16-bit numbers whose sum is a query's element: 1 or 3
  int columns_per_token = 0;
  int list_registers = 0;  // 1 or 4; a list has places for 32 times as many
  int warpgroups = 0;      // of a block of threads: 1, 2 or 4
  int64_t tokens_per_block = 0;
  int64_t num_groups = 0;  // of blocks that have the same lists
  int num_splits = 0;      // shares of the windows
  size_t shared_bytes = 0;
  size_t workspace_bytes = 0;
  int64_t num_tickets = 0;
};

ImportancePlan plan_importance(const ImportanceShape& shape, const DeviceInfo& device);

}  // namespace longspan::cuda
