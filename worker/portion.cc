#include "worker/portion.h"

#include <algorithm>

#include "kernels/anchors.h"
#include "worker/rows.h"
#include "worker/selection.h"

namespace longspan {
namespace {

// Scratch memory of a round, roughly, on each rank.
constexpr double kRoundBytes = double{64 << 20};
// Multiplications of a round, roughly, over all ranks: about a second of two cores. Deadlines are
// looked at between rounds.
constexpr double kRoundMultiplications = 3e10;

// Places for winners and candidates of a row, at most.
struct SearchSize {
  int64_t places = 0;
  int64_t candidates = 0;  // that are listed one by one
};

SearchSize search_size(const Branch& branch, Phase phase, int64_t position) {
  if (!branch.needs_search()) {
    return {};
  }
  if (!branch.selection.spans) {
    return {block_choice(branch, phase, position).k, 0};
  }
  const int64_t anchors = ceil_scaled_power({1, 1}, position + 1, branch.search.anchor_power);
  return {span_budget(branch, phase, anchors), anchors};
}

// Scratch bytes that the last and longest row of a task takes, roughly: queries, candidate lists of
// all ranks, spans and partial answers.
int64_t bytes_per_row(const TaskState& state, int num_ranks) {
  const ContextShape& shape = state.shard->shape;
  const int64_t heads = shape.num_query_heads;
  int64_t parts = static_cast<int64_t>(state.method->branches.size());
  int64_t bytes = heads * shape.key_dim * 8;
  for (const Branch& branch : state.method->branches) {
    const SearchSize size = search_size(branch, state.task->phase, state.end() - 1);
    const int64_t lists =
        num_selection_heads(branch.search, shape.num_query_heads, shape.num_kv_heads);
    bytes += lists * size.places * (12 * (num_ranks + 1) + 16) + 8 * size.candidates + 64;
    parts += branch.selection.spans ? size.places : 0;
  }
  const int64_t copies = num_ranks > 1 ? 3 : 2;
  bytes += parts * heads * (shape.value_dim + 1) * 4 * copies;
  return state.task->compare_with_dense ? 4 * bytes : bytes;
}

// Keys, or summaries of them, that the last row of a task reads for each query head, roughly.
int64_t keys_per_row(const Branch& branch, Phase phase, int64_t position) {
  const int64_t visible = position + 1;
  if (branch.selection.kind == SelectionKind::kAll) {
    return visible;
  }
  int64_t keys =
      branch.summary.kind == SummaryKind::kNone ? 0 : branch.summary.num_entries(visible);
  keys += static_window(branch) + branch.mask.sink_tokens;
  const SearchSize size = search_size(branch, phase, position);
  if (branch.selection.spans) {
    const SpanReach reach = span_reach(branch.selection, position);
    keys += size.candidates + size.places * (reach.backward + reach.forward + 1);
  } else if (branch.needs_search()) {
    const int64_t forced =
        branch.selection.forced_first_blocks + branch.selection.forced_last_blocks;
    keys += (size.places + forced) * branch.selection.block_tokens;
  }
  return std::min(keys, 2 * visible);
}

// What share of a round the last row of a task takes.
double share_of_round(const TaskState& state, int num_ranks) {
  const ContextShape& shape = state.shard->shape;
  double keys = 0;
  for (const Branch& branch : state.method->branches) {
    keys += static_cast<double>(keys_per_row(branch, state.task->phase, state.end() - 1));
  }
  const double multiplications = keys * shape.num_query_heads * (shape.key_dim + shape.value_dim);
  return std::max(static_cast<double>(bytes_per_row(state, num_ranks)) / kRoundBytes,
                  multiplications / kRoundMultiplications);
}

struct InputSizes {
  size_t query = 0;
  size_t search_query = 0;
  size_t gates = 0;
};

InputSizes input_sizes(const Portion& portion) {
  InputSizes sizes;
  sizes.query = portion.row_heads() * static_cast<size_t>(portion.shape().key_dim);
  if (portion.method().needs_search_query()) {
    sizes.search_query = sizes.query;
  }
  if (portion.method().needs_gates()) {
    sizes.gates = portion.row_heads() * portion.method().branches.size();
  }
  return sizes;
}

// The portion's rows of a tensor of the whole task.
float* pack_tensor(const TensorIn& tensor, const Portion& portion, size_t count, float* out) {
  const size_t row_elements = count / static_cast<size_t>(portion.num_rows);
  const size_t skipped = static_cast<size_t>(portion.first_row) * row_elements;
  const auto* data = static_cast<const std::byte*>(tensor.data) + skipped * size_of(tensor.dtype);
  convert_elements(tensor.dtype, data, DataType::kFloat32, out, count);
  return out + count;
}

}  // namespace

SummaryRun* Portion::find_summary(int summary) {
  for (SummaryRun& run : summaries) {
    if (run.summary == summary) {
      return &run;
    }
  }
  return nullptr;
}

std::vector<Round> plan_rounds(std::span<TaskState> tasks, int num_ranks) {
  std::vector<Round> rounds;
  double left = 0;  // of the last round
  for (TaskState& state : tasks) {
    const double share = share_of_round(state, num_ranks);
    for (int64_t row = 0; row < state.task->num_rows;) {
      if (left < share) {
        rounds.emplace_back();
        left = std::max(1.0, share);
      }
      const auto fitting = static_cast<int64_t>(left / share);
      const int64_t rows = std::clamp<int64_t>(fitting, 1, state.task->num_rows - row);
      Portion& portion = rounds.back().emplace_back();
      portion.state = &state;
      portion.first_row = row;
      portion.num_rows = rows;
      row += rows;
      left -= static_cast<double>(rows) * share;
    }
  }
  return rounds;
}

size_t input_floats(const Portion& portion) {
  const InputSizes sizes = input_sizes(portion);
  return sizes.query + sizes.search_query + sizes.gates;
}

void pack_inputs(const Portion& portion, float* out) {
  const InputSizes sizes = input_sizes(portion);
  const TaskIo& io = *portion.state->io;
  out = pack_tensor(io.query, portion, sizes.query, out);
  if (sizes.search_query > 0) {
    out = pack_tensor(io.search_query, portion, sizes.search_query, out);
  }
  if (sizes.gates > 0) {
    pack_tensor(io.gates, portion, sizes.gates, out);
  }
}

void set_inputs(Portion& portion, const float* inputs) {
  const InputSizes sizes = input_sizes(portion);
  portion.query = inputs;
  inputs += sizes.query;
  portion.search_query = sizes.search_query > 0 ? inputs : nullptr;
  inputs += sizes.search_query;
  portion.gates = sizes.gates > 0 ? inputs : nullptr;
}

}  // namespace longspan
