#include "worker/group_checks.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

#include "base/checked.h"

namespace longspan {
namespace {

constexpr int kMaxLayers = 1024;
constexpr int kMaxHeads = 1024;
constexpr int kMaxHeadDim = 1024;

Status check_between(const char* field, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": must be between ", low, " and ", high, ", got ", value));
  }
  return absl::OkStatus();
}

Status check_dimensions(const ContextShape& shape) {
  LONGSPAN_RETURN_IF_ERROR(check_between("num_layers", shape.num_layers, 1, kMaxLayers));
  LONGSPAN_RETURN_IF_ERROR(check_between("num_query_heads", shape.num_query_heads, 1, kMaxHeads));
  LONGSPAN_RETURN_IF_ERROR(
      check_between("num_kv_heads", shape.num_kv_heads, 1, shape.num_query_heads));
  LONGSPAN_RETURN_IF_ERROR(check_between("key_dim", shape.key_dim, 1, kMaxHeadDim));
  LONGSPAN_RETURN_IF_ERROR(check_between("value_dim", shape.value_dim, 1, kMaxHeadDim));
  LONGSPAN_RETURN_IF_ERROR(check_between("max_tokens", shape.max_tokens, 1, kMaxContextTokens));
  if (shape.num_query_heads % shape.num_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("num_kv_heads: must divide num_query_heads = ",
                                                   shape.num_query_heads,
                                                   ", got ",
                                                   shape.num_kv_heads));
  }
  if (!std::isfinite(shape.scale) || shape.scale <= 0) {
    return absl::InvalidArgumentError("scale: must be positive and finite");
  }
  if (!std::isfinite(shape.soft_cap) || shape.soft_cap < 0) {
    return absl::InvalidArgumentError("soft_cap: must be 0 or positive and finite");
  }
  const auto heads = static_cast<size_t>(shape.num_query_heads);
  const size_t sinks = shape.sink_logits.size();
  if (sinks != 0 && sinks != heads && sinks != heads * static_cast<size_t>(shape.num_layers)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "sink_logits: needs 0, num_query_heads or num_layers * num_query_heads elements, has ",
        sinks));
  }
  return absl::OkStatus();
}

Problem problem_of(const ContextShape& shape, const Method& method) {
  return {&method,
          shape.num_query_heads,
          shape.num_kv_heads,
          shape.key_dim,
          shape.value_dim,
          shape.kv_dtype};
}

// The method is well-formed and the backend takes it.
Status check_method(const Backend& backend, const ContextShape& shape, const Method& method) {
  std::vector<std::string> reasons;
  for (const FieldViolation& violation : validate(method)) {
    reasons.push_back(absl::StrCat(violation.field, ": ", violation.description));
  }
  if (!reasons.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("method \"", method.name, "\": ", absl::StrJoin(reasons, "; ")));
  }
  return backend.supports(problem_of(shape, method));
}

Status with_expected_pos(Status status, int64_t expected_pos) {
  status.SetPayload(kExpectedPosPayload, absl::Cord(absl::StrCat(expected_pos)));
  return status;
}

Status check_position(const ContextShard& shard, const Task& task, int64_t length) {
  if (task.layer < 0 || task.layer >= shard.shape.num_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer: must be below ", shard.shape.num_layers, ", got ", task.layer));
  }
  LONGSPAN_RETURN_IF_ERROR(check_between("num_rows", task.num_rows, 1, shard.shape.max_tokens));
  LONGSPAN_RETURN_IF_ERROR(check_between("start_pos", task.start_pos, 0, kMaxContextTokens));
  if (task.start_pos + task.num_rows > shard.shape.max_tokens) {
    return absl::OutOfRangeError(absl::StrCat("start_pos: rows up to ",
                                              task.start_pos + task.num_rows,
                                              " pass max_tokens = ",
                                              shard.shape.max_tokens));
  }
  const int64_t needed = task.has_tokens ? task.start_pos : task.start_pos + task.num_rows;
  if (needed > length) {
    return with_expected_pos(
        absl::OutOfRangeError(absl::StrCat("start_pos: layer ",
                                           task.layer,
                                           " holds ",
                                           length,
                                           " tokens, rows from ",
                                           task.start_pos,
                                           task.has_tokens ? " leave a gap" : " are not all there",
                                           ": the expected position is ",
                                           length)),
        length);
  }
  return absl::OkStatus();
}

Status check_layer(const ContextShard& shard, int layer) {
  return check_between("layer", layer, 0, shard.shape.num_layers - 1);
}

Status check_tokens(const TensorIn& key, const TensorIn& value) {
  if (key.data == nullptr || value.data == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(key.data == nullptr ? "key" : "value",
                                                   ": missing, keys and values go together"));
  }
  if (key.dtype != value.dtype) {
    return absl::InvalidArgumentError("value: must have the element type of key");
  }
  return absl::OkStatus();
}

// The place of `method` among the context's; -1 for another one, whose summaries must be kept and
// whose blocks must not be cut by the layout.
StatusOr<int> place_of_method(const Backend& backend,
                              const ContextShard& shard,
                              const Method& method) {
  const std::vector<Method>& methods = shard.shape.methods;
  const auto found = std::find(methods.begin(), methods.end(), method);
  if (found != methods.end()) {
    return static_cast<int>(found - methods.begin());
  }
  LONGSPAN_RETURN_IF_ERROR(check_method(backend, shard.shape, method));
  for (size_t i = 0; i < method.branches.size(); ++i) {
    const SummarySpec& summary = method.branches[i].summary;
    if (summary.kind != SummaryKind::kNone && shard.map.find_summary(summary) < 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("method.branches[", i, "].summary: the context does not keep this summary"));
    }
  }
  const Layout& layout = shard.shape.layout;
  if (layout.num_ranks > 1 && layout.stripe_tokens % method.alignment_tokens() != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("method: its blocks do not divide the stripe of ",
                     layout.stripe_tokens,
                     " tokens that the context is laid out in"));
  }
  return -1;
}

}  // namespace

Status check_shape(const Backend& backend, int num_ranks, ContextShape& shape) {
  LONGSPAN_RETURN_IF_ERROR(check_dimensions(shape));
  if (shape.methods.empty()) {
    return absl::InvalidArgumentError("methods: at least one is needed");
  }
  int64_t alignment = kPageTokens;
  for (const Method& method : shape.methods) {
    LONGSPAN_RETURN_IF_ERROR(check_method(backend, shape, method));
    alignment = std::lcm(alignment, method.alignment_tokens());
  }
  if (shape.layout.num_ranks != num_ranks) {
    return absl::InvalidArgumentError(absl::StrCat(
        "layout.num_ranks: the group has ", num_ranks, " ranks, got ", shape.layout.num_ranks));
  }
  LONGSPAN_ASSIGN_OR_RETURN(
      shape.layout,
      Layout::make(
          shape.layout.kind, num_ranks, shape.layout.stripe_tokens, shape.max_tokens, alignment));
  return absl::OkStatus();
}

Status check_length(const ContextShard& shard, int64_t num_tokens) {
  const int64_t committed = shard.committed();
  if (num_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_tokens: must not be negative, got ", num_tokens));
  }
  if (num_tokens > committed) {
    return with_expected_pos(
        absl::OutOfRangeError(
            absl::StrCat("num_tokens: the context holds ", committed, " tokens, got ", num_tokens)),
        committed);
  }
  return absl::OkStatus();
}

Status check_write(const ContextShard& shard, const Task& task, const TaskIo& io) {
  LONGSPAN_RETURN_IF_ERROR(check_layer(shard, task.layer));
  LONGSPAN_RETURN_IF_ERROR(check_tokens(io.key, io.value));
  return check_position(shard, task, shard.layers[static_cast<size_t>(task.layer)].staged);
}

Status check_item(const Backend& backend,
                  const ContextShard& shard,
                  const AttendItem& item,
                  Task& task) {
  LONGSPAN_RETURN_IF_ERROR(check_layer(shard, item.layer));
  const LayerShard& layer = shard.layers[static_cast<size_t>(item.layer)];
  LONGSPAN_RETURN_IF_ERROR(check_position(shard, task, layer.visible));
  if (item.query.data == nullptr) {
    return absl::InvalidArgumentError("query: missing");
  }
  if (task.has_tokens) {
    LONGSPAN_RETURN_IF_ERROR(check_tokens(item.key, item.value));
    if (item.compare_with_dense) {
      return absl::InvalidArgumentError("key: a comparison writes nothing");
    }
    if (layer.staged != layer.visible) {
      return absl::AbortedError(
          absl::StrCat("layer ", item.layer, " is being appended to by another call"));
    }
  }
  if (item.method == nullptr) {
    return absl::InvalidArgumentError("method: missing");
  }
  LONGSPAN_ASSIGN_OR_RETURN(task.method_index, place_of_method(backend, shard, *item.method));
  if (task.method_index < 0) {
    task.method = *item.method;
  }
  const Method& method =
      effective_method(*item.method, item.layer, item.phase, item.start_pos + item.num_rows);
  if (method.needs_gates() && item.gates.data == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("gates: method \"", method.name, "\" needs them"));
  }
  if (method.needs_search_query() && item.search_query.data == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("search_query: method \"", method.name, "\" needs it"));
  }
  return absl::OkStatus();
}

void prepare_result(const ContextShard& shard, const Task& task, AttendResult& result) {
  const ContextShape& shape = shard.shape;
  const Method& method =
      task.method_index < 0 ? task.method : shape.methods[static_cast<size_t>(task.method_index)];
  const size_t rows =
      static_cast<size_t>(task.num_rows) * static_cast<size_t>(shape.num_query_heads);
  result.out.resize(rows * static_cast<size_t>(shape.value_dim));
  const Method& effective =
      effective_method(method, task.layer, task.phase, task.start_pos + task.num_rows);
  if (effective.has_lse()) {
    result.lse.resize(rows);
  }
}

Status task_status(const TaskState& state) {
  if (state.mismatch >= 0) {
    return absl::AbortedError(absl::StrCat("tokens differ from what layer ",
                                           state.task->layer,
                                           " holds at position ",
                                           state.mismatch));
  }
  if (state.abandoned) {
    return absl::DeadlineExceededError("the deadline passed within the step");
  }
  return absl::OkStatus();
}

Status Admission::admit(const ContextShard& shard, const Task& task) {
  if (!task.has_tokens) {
    return absl::OkStatus();
  }
  const LayerShard& layer = shard.layers[static_cast<size_t>(task.layer)];
  const int64_t end = std::max(layer.staged, task.start_pos + task.num_rows);
  std::vector<int64_t> used = used_bytes_;
  for (size_t rank = 0; rank < used.size(); ++rank) {
    const int64_t growth = shard.maps[rank].growth_bytes(layer.staged, end, layer.may_be_shared);
    used[rank] += growth;
    if (growth > 0 && used[rank] > capacity_bytes_) {
      return absl::ResourceExhaustedError(absl::StrCat("rank ",
                                                       rank,
                                                       " has no room for ",
                                                       growth,
                                                       " more bytes: ",
                                                       used_bytes_[rank],
                                                       " of ",
                                                       capacity_bytes_,
                                                       " are in use"));
    }
  }
  used_bytes_ = std::move(used);
  return absl::OkStatus();
}

}  // namespace longspan
