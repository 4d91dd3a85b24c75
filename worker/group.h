// A group of ranks as its lead sees it: the one door from the service to the pipeline.
//
// A Group owns its ranks (here: threads of this process joined by the in-process communicator;
// other processes later, behind the same face). Calls are made by one thread at a time, the lead's
// engine thread, and every call is one step that all ranks run in the same order. Contexts are
// named by handles that the lead chooses and never reuses.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/data_type.h"
#include "base/status.h"
#include "kernels/method.h"
#include "worker/layout.h"

namespace longspan {

using ContextHandle = uint64_t;
using Deadline = std::chrono::steady_clock::time_point;

// Payload of an OUT_OF_RANGE status: the position that a write may start at, in decimal.
inline constexpr char kExpectedPosPayload[] = "longspan.expected_pos";

struct GroupOptions {
  int num_ranks = 1;
  std::string backend = "simd";
  int threads_per_rank = 1;
  // Bytes of pages, keys, values and summaries together, over all ranks.
  int64_t kv_capacity_bytes = int64_t{4} << 30;
};

// What stays fixed for a context's life.
struct ContextShape {
  int num_layers = 0;
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int key_dim = 0;
  int value_dim = 0;
  DataType kv_dtype = DataType::kBFloat16;
  float scale = 0.0F;
  float soft_cap = 0.0F;
  std::vector<float> sink_logits;  // empty, [H] or [layers * H]
  std::vector<Method> methods;     // at least one; their summaries are kept
  Layout layout;
  int64_t max_tokens = 0;
};

// Row-major elements in the caller's memory, alive for the call. Null: absent.
struct TensorIn {
  DataType dtype = DataType::kFloat32;
  const void* data = nullptr;
};

// Rows of one layer of one context. Row r is at position start_pos + r and sees the tokens up to
// its own.
struct AttendItem {
  ContextHandle context = 0;
  int layer = 0;
  Phase phase = Phase::kDecode;
  int64_t start_pos = 0;
  int64_t num_rows = 0;
  TensorIn query;         // [rows][H][D]
  TensorIn key;           // [rows][G][D] or absent: the tokens are stored already
  TensorIn value;         // [rows][G][E]
  TensorIn gates;         // [rows][H][branches], for methods that need them
  TensorIn search_query;  // [rows][H][D], for methods that need it
  const Method* method = nullptr;
  bool return_selection = false;
  // Fill `mass` of every selected span, and recall and error against dense attention. Writes
  // nothing.
  bool compare_with_dense = false;
};

struct SelectedSpan {
  int rank = 0;
  int64_t begin = 0;  // global positions
  int64_t end = 0;
  std::optional<float> score;
  std::optional<float> mass;
};

struct RowSelection {
  int64_t position = 0;
  int query_head = 0;
  int branch = 0;
  std::vector<SelectedSpan> spans;
  int64_t num_tokens = 0;
};

struct AttendResult {
  Status status;
  std::vector<float> out;  // [rows][H][E]
  std::vector<float> lse;  // [rows][H]; empty when the method has none
  std::vector<RowSelection> selections;
  std::vector<float> recall;          // [rows][H]
  std::vector<float> relative_error;  // [rows][H]
  int64_t layer_length = 0;
  // Summed over rows and query heads: keys attended to, and keys visible.
  int64_t selected_tokens = 0;
  int64_t visible_tokens = 0;
};

// Seconds of the last step, the slowest rank's: what longspan_stage_duration_seconds shows.
struct StageTimes {
  double scatter = 0;
  double select = 0;
  double compute = 0;
  double reduce = 0;
};

struct ContextUsage {
  int64_t kv_bytes = 0;
  int64_t summary_bytes = 0;
  std::vector<int64_t> layer_lengths;
};

struct GroupUsage {
  std::vector<int64_t> rank_bytes;  // pages in use
  int64_t capacity_bytes = 0;
  int64_t bytes_sent = 0;
  int64_t bytes_received = 0;
};

class Group {
 public:
  static StatusOr<std::unique_ptr<Group>> start_in_process(const GroupOptions& options);
  Group() = default;
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  virtual ~Group() = default;

  virtual int num_ranks() const = 0;
  virtual std::string backend_detail() const = 0;

  // UNIMPLEMENTED with the backend's reason, INVALID_ARGUMENT naming the field.
  virtual Status create(ContextHandle context, const ContextShape& shape) = 0;
  virtual Status remove(ContextHandle context) = 0;
  virtual Status fork(ContextHandle parent, ContextHandle child, int64_t num_tokens) = 0;
  virtual Status truncate(ContextHandle context, int64_t num_tokens) = 0;

  // Stores rows [start_pos, start_pos + num_rows) of a layer behind what is visible. A layer has at
  // most one run of staged rows; `commit` shows it, `rollback` forgets it. At or below the staged
  // end equal bytes are a no-op and different ones ABORTED; beyond it OUT_OF_RANGE, saying the
  // expected position. RESOURCE_EXHAUSTED before anything is taken.
  virtual Status write(ContextHandle context,
                       int layer,
                       int64_t start_pos,
                       int64_t num_rows,
                       TensorIn key,
                       TensorIn value) = 0;
  virtual Status commit(ContextHandle context) = 0;
  virtual Status rollback(ContextHandle context) = 0;

  // Items of any contexts in one step; each succeeds or fails on its own. Keys and values of an
  // item are written and shown first. Items of one (context, layer) must not repeat in a call.
  // DEADLINE_EXCEEDED items had no effect.
  virtual std::vector<AttendResult> attend(std::span<const AttendItem> items,
                                           Deadline deadline) = 0;

  virtual StatusOr<ContextUsage> usage(ContextHandle context) = 0;
  virtual GroupUsage usage() = 0;
  virtual StageTimes last_step() const = 0;

  // Idempotent; the destructor calls it. Other threads may call it to interrupt a step.
  virtual void stop() = 0;
};

}  // namespace longspan
