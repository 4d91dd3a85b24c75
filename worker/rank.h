// What one rank works with, and a step's tasks as it sees them.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/device.h"
#include "comm/communicator.h"
#include "kernels/anchors.h"
#include "kernels/backend.h"
#include "worker/arena.h"
#include "worker/shard_store.h"
#include "worker/step.h"

namespace longspan {

// How long a rank waits for its peers within a step. Not the client's deadline: that one is looked
// at between rounds of rows, and passing it does not break the group.
inline constexpr std::chrono::minutes kExchangeTimeout{5};

// Owned by the group, used by the rank's engine thread alone.
struct Rank {
  Rank(int rank_index,
       Communicator& data_channel,
       std::unique_ptr<Backend> rank_backend,
       int64_t capacity_bytes)
      : index(rank_index),
        data(data_channel),
        backend(std::move(rank_backend)),
        store(rank_index, capacity_bytes) {}

  bool is_lead() const { return index == 0; }
  int size() const { return data.size(); }
  static Deadline exchange_deadline() {
    return std::chrono::steady_clock::now() + kExchangeTimeout;
  }
  // The table of a search's anchors, kept as it grows.
  AnchorTable& anchors(const SearchSpec& search);

  const int index;
  Communicator& data;
  const std::unique_ptr<Backend> backend;
  Stream stream;
  ShardStore store;
  Arena arena;

 private:
  struct NamedTable {
    Rational power;
    int64_t first_stripe;
    AnchorTable table;
  };
  std::deque<NamedTable> anchor_tables_;
};

// The lead's side of a task: the caller's tensors and the place for the answer.
struct TaskIo {
  TensorIn query;
  TensorIn key;
  TensorIn value;
  TensorIn gates;
  TensorIn search_query;
  AttendResult* result = nullptr;  // kAttend alone
};

// A task while its step runs.
struct TaskState {
  const Task* task = nullptr;
  ContextShard* shard = nullptr;
  const Method* method = nullptr;  // kAttend: the effective one
  TaskIo* io = nullptr;            // on the lead alone
  int64_t visible_before = 0;
  int64_t staged_before = 0;
  // First position where the rows differ from what is stored; -1: nowhere. Known to all ranks.
  int64_t mismatch = -1;
  bool abandoned = false;  // its deadline passed

  LayerShard& layer() const { return shard->layers[static_cast<size_t>(task->layer)]; }
  int64_t end() const { return task->start_pos + task->num_rows; }
  // Rows below are compared, rows from here on appended.
  int64_t append_begin() const { return std::clamp(staged_before, task->start_pos, end()); }
  bool is_running() const { return mismatch < 0 && !abandoned; }
};

// What a rank tells the lead at the end of a step.
struct RankReport {
  int64_t used_bytes = 0;
  double scatter_seconds = 0;
  double select_seconds = 0;
  double compute_seconds = 0;
  double reduce_seconds = 0;
};

// Adds the time of its life to a figure of the report.
class StageTimer {
 public:
  explicit StageTimer(double& seconds)
      : seconds_(seconds), start_(std::chrono::steady_clock::now()) {}
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;
  ~StageTimer() {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
    seconds_ += elapsed.count();
  }

 private:
  double& seconds_;
  const std::chrono::steady_clock::time_point start_;
};

inline std::span<const std::byte> bytes_of(const void* data, size_t size) {
  return {static_cast<const std::byte*>(data), size};
}
inline std::span<std::byte> writable_bytes_of(void* data, size_t size) {
  return {static_cast<std::byte*>(data), size};
}

}  // namespace longspan
