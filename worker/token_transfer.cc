#include "worker/token_transfer.h"

#include <algorithm>
#include <limits>

#include "worker/summaries.h"

namespace longspan {
namespace {

// Up to here a broadcast costs less than an exchange of its own.
constexpr size_t kBroadcastBytes = size_t{64} << 10;

constexpr int64_t kNoMismatch = std::numeric_limits<int64_t>::max();

size_t key_row_elements(const ContextShape& shape) {
  return static_cast<size_t>(shape.num_kv_heads) * static_cast<size_t>(shape.key_dim);
}
size_t value_row_elements(const ContextShape& shape) {
  return static_cast<size_t>(shape.num_kv_heads) * static_cast<size_t>(shape.value_dim);
}
// A token's keys and values in the cache.
size_t row_bytes(const ContextShape& shape) {
  return (key_row_elements(shape) + value_row_elements(shape)) * size_of(shape.kv_dtype);
}

// The rows from `first_row` on, of rows whose keys start at `rows.keys`.
TokenRows rows_from(const ContextShape& shape, const TokenRows& rows, int64_t first_row) {
  const size_t first = static_cast<size_t>(first_row) * size_of(rows.dtype);
  return {rows.dtype,
          rows.keys + first * key_row_elements(shape),
          rows.values + first * value_row_elements(shape)};
}

TokenRows lead_rows(const TaskIo& io) {
  return {io.key.dtype,
          static_cast<const std::byte*>(io.key.data),
          static_cast<const std::byte*>(io.value.data)};
}

// Packs `num_rows` rows as keys, then values, in the cache's type. The lead's keys and values may
// differ in type from the cache, not from each other.
std::byte* pack_rows(const ContextShape& shape,
                     const TokenRows& rows,
                     int64_t num_rows,
                     std::byte* out) {
  const size_t keys = static_cast<size_t>(num_rows) * key_row_elements(shape);
  const size_t values = static_cast<size_t>(num_rows) * value_row_elements(shape);
  convert_elements(rows.dtype, rows.keys, shape.kv_dtype, out, keys);
  out += keys * size_of(shape.kv_dtype);
  convert_elements(rows.dtype, rows.values, shape.kv_dtype, out, values);
  return out + values * size_of(shape.kv_dtype);
}

}  // namespace

TokenTransfer::TokenTransfer(Rank& rank, std::span<TaskState> tasks)
    : rank_(rank), tasks_(tasks), sources_(tasks.size()) {
  size_t bytes = 0;
  for (const TaskState& state : tasks_) {
    if (has_tokens(state)) {
      bytes += static_cast<size_t>(state.task->num_rows) * row_bytes(state.shard->shape);
    }
  }
  if (rank_.size() > 1 && bytes > 0) {
    scattered_ = bytes > kBroadcastBytes;
    broadcast_bytes_ = scattered_ ? 0 : bytes;
  }
}

void TokenTransfer::pack_broadcast(std::byte* out) const {
  for (const TaskState& state : tasks_) {
    if (has_tokens(state)) {
      out = pack_rows(state.shard->shape, lead_rows(*state.io), state.task->num_rows, out);
    }
  }
}

std::vector<WriteSegment> TokenTransfer::segments(const TaskState& state, int rank) const {
  const ShardMap& map = state.shard->maps[static_cast<size_t>(rank)];
  std::vector<WriteSegment> segments =
      map.owned_segments(state.task->start_pos, state.append_begin());
  const std::vector<WriteSegment> appended = map.write_segments(state.append_begin(), state.end());
  segments.insert(segments.end(), appended.begin(), appended.end());
  return segments;
}

int64_t TokenTransfer::scattered_bytes(int rank) const {
  int64_t bytes = 0;
  for (const TaskState& state : tasks_) {
    if (has_tokens(state)) {
      for (const WriteSegment& segment : segments(state, rank)) {
        bytes += segment.num_rows * static_cast<int64_t>(row_bytes(state.shard->shape));
      }
    }
  }
  return bytes;
}

void TokenTransfer::pack_scattered(int rank, std::byte* out) const {
  for (const TaskState& state : tasks_) {
    if (has_tokens(state)) {
      const ContextShape& shape = state.shard->shape;
      for (const WriteSegment& segment : segments(state, rank)) {
        const TokenRows rows =
            rows_from(shape, lead_rows(*state.io), segment.first_token - state.task->start_pos);
        out = pack_rows(shape, rows, segment.num_rows, out);
      }
    }
  }
}

Status TokenTransfer::scatter() {
  const auto ranks = static_cast<size_t>(rank_.size());
  std::vector<int64_t> send_sizes(ranks, 0);
  std::vector<int64_t> receive_sizes(ranks, 0);
  std::span<std::byte> send;
  std::span<std::byte> received;
  if (rank_.is_lead()) {
    int64_t total = 0;
    for (size_t peer = 1; peer < ranks; ++peer) {
      send_sizes[peer] = scattered_bytes(static_cast<int>(peer));
      total += send_sizes[peer];
    }
    LONGSPAN_ASSIGN_OR_RETURN(send,
                              rank_.arena.allocate_span<std::byte>(static_cast<size_t>(total)));
    int64_t offset = 0;
    for (size_t peer = 1; peer < ranks; ++peer) {
      pack_scattered(static_cast<int>(peer), send.data() + offset);
      offset += send_sizes[peer];
    }
  } else {
    receive_sizes[0] = scattered_bytes(rank_.index);
    LONGSPAN_ASSIGN_OR_RETURN(
        received, rank_.arena.allocate_span<std::byte>(static_cast<size_t>(receive_sizes[0])));
  }
  LONGSPAN_RETURN_IF_ERROR(
      rank_.data.all_to_all(send, send_sizes, received, receive_sizes, Rank::exchange_deadline()));
  const std::byte* data = received.data();
  for (size_t i = 0; i < tasks_.size() && !rank_.is_lead(); ++i) {
    if (has_tokens(tasks_[i])) {
      const ContextShape& shape = tasks_[i].shard->shape;
      sources_[i] = {{shape.kv_dtype, data, nullptr}, -1};
      for (const WriteSegment& segment : segments(tasks_[i], rank_.index)) {
        data += static_cast<size_t>(segment.num_rows) * row_bytes(shape);
      }
    }
  }
  return absl::OkStatus();
}

Status TokenTransfer::receive(const std::byte* broadcast) {
  if (scattered_) {
    LONGSPAN_RETURN_IF_ERROR(scatter());
  }
  for (size_t i = 0; i < tasks_.size(); ++i) {
    TaskState& state = tasks_[i];
    if (!has_tokens(state)) {
      continue;
    }
    const ContextShape& shape = state.shard->shape;
    if (rank_.is_lead()) {
      sources_[i] = {lead_rows(*state.io), state.task->start_pos};
    } else if (!scattered_) {
      const auto rows = static_cast<size_t>(state.task->num_rows);
      const std::byte* values =
          broadcast + rows * key_row_elements(shape) * size_of(shape.kv_dtype);
      sources_[i] = {{shape.kv_dtype, broadcast, values}, state.task->start_pos};
      broadcast += rows * row_bytes(shape);
    }
  }
  return absl::OkStatus();
}

TokenRows TokenTransfer::take(const TaskState& state,
                              Source& source,
                              const WriteSegment& segment) const {
  const ContextShape& shape = state.shard->shape;
  if (source.first_token >= 0) {
    return rows_from(shape, source.rows, segment.first_token - source.first_token);
  }
  TokenRows rows = source.rows;
  const auto num_rows = static_cast<size_t>(segment.num_rows);
  rows.values = rows.keys + num_rows * key_row_elements(shape) * size_of(shape.kv_dtype);
  source.rows.keys += num_rows * row_bytes(shape);
  return rows;
}

Status TokenTransfer::store() {
  bool compares = false;
  for (size_t i = 0; i < tasks_.size(); ++i) {
    TaskState& state = tasks_[i];
    if (!has_tokens(state)) {
      continue;
    }
    compares = compares || state.task->start_pos < state.append_begin();
    const auto owned = state.shard->map.owned_segments(state.task->start_pos, state.append_begin());
    for (const WriteSegment& segment : owned) {
      const TokenRows rows = take(state, sources_[i], segment);
      const int64_t row =
          rank_.store.first_difference(*state.shard, state.task->layer, segment, rows);
      if (row >= 0 && state.mismatch < 0) {
        state.mismatch = segment.first_token + row;
      }
    }
  }
  if (compares) {
    LONGSPAN_RETURN_IF_ERROR(agree_on_mismatches());
  }
  for (size_t i = 0; i < tasks_.size(); ++i) {
    TaskState& state = tasks_[i];
    if (has_tokens(state) && state.mismatch < 0) {
      const auto segments = state.shard->map.write_segments(state.append_begin(), state.end());
      LONGSPAN_RETURN_IF_ERROR(append(state, sources_[i], segments));
    }
  }
  return absl::OkStatus();
}

Status TokenTransfer::append(TaskState& state,
                             Source& source,
                             std::span<const WriteSegment> segments) {
  for (const WriteSegment& segment : segments) {
    const TokenRows rows = take(state, source, segment);
    LONGSPAN_RETURN_IF_ERROR(rank_.store.write(*state.shard, state.task->layer, segment, rows));
  }
  LONGSPAN_RETURN_IF_ERROR(update_summaries(rank_.store,
                                            *state.shard,
                                            state.task->layer,
                                            state.append_begin(),
                                            state.end(),
                                            *rank_.backend,
                                            rank_.stream));
  LayerShard& layer = state.layer();
  layer.staged = std::max(layer.staged, state.end());
  if (state.task->show) {
    layer.visible = std::max(layer.visible, state.end());
  }
  return absl::OkStatus();
}

Status TokenTransfer::agree_on_mismatches() {
  const size_t count = tasks_.size();
  const auto ranks = static_cast<size_t>(rank_.size());
  std::vector<int64_t> own(count);
  std::vector<int64_t> all(count * ranks);
  for (size_t i = 0; i < count; ++i) {
    own[i] = tasks_[i].mismatch < 0 ? kNoMismatch : tasks_[i].mismatch;
  }
  LONGSPAN_RETURN_IF_ERROR(
      rank_.data.all_gather(bytes_of(own.data(), count * sizeof(int64_t)),
                            writable_bytes_of(all.data(), all.size() * sizeof(int64_t)),
                            Rank::exchange_deadline()));
  for (size_t i = 0; i < count; ++i) {
    int64_t first = kNoMismatch;
    for (size_t rank = 0; rank < ranks; ++rank) {
      first = std::min(first, all[rank * count + i]);
    }
    tasks_[i].mismatch = first == kNoMismatch ? -1 : first;
  }
  return absl::OkStatus();
}

}  // namespace longspan
