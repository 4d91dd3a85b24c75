#include "worker/attend.h"

#include <algorithm>

#include "kernels/anchors.h"
#include "worker/selection.h"

namespace longspan {

void SpanLists::close(bool joined) {
  if (joined) {
    coalesce(spans, static_cast<size_t>(offsets.back()));
  }
  offsets.push_back(static_cast<int64_t>(spans.size()));
}

void SpanLists::clear() {
  offsets.assign(1, 0);
  spans.clear();
}

Span winner_tokens(
    const Portion& portion, const BranchRun& run, int64_t row, int64_t head, int64_t place) {
  const int64_t id = run.ids[(row * run.num_selection_heads + head) * run.max_k + place];
  if (id < 0) {
    return {};
  }
  const int64_t position = portion.position(row);
  const Branch& branch = *run.branch;
  return branch.selection.spans
             ? span_around(
                   span_reach(branch.selection, position), id, position, static_window(branch))
             : block_tokens(branch, id, position);
}

void append_selected_spans(const Portion& portion,
                           const BranchRun& run,
                           int64_t row,
                           int64_t head,
                           std::vector<Span>& spans) {
  append_static_spans(*run.branch, portion.position(row), spans);
  for (int64_t place = 0; place < run.max_k; ++place) {
    const Span tokens = winner_tokens(portion, run, row, head, place);
    if (tokens.begin == tokens.end) {
      break;
    }
    spans.push_back(tokens);
  }
}

namespace {

// Replaces the global spans from index `first` on by what the rank holds of them.
void localize(const Layout& layout, int rank, std::vector<Span>& spans, size_t first) {
  if (layout.num_ranks == 1) {
    return;
  }
  for (size_t i = first; i < spans.size(); ++i) {
    spans[i] = to_local(layout, rank, spans[i]);
  }
}

int64_t heads_of_a_list(const Portion& portion, int num_selection_heads) {
  return portion.shape().num_query_heads / num_selection_heads;
}

Status attend_branch(Rank& rank, Portion& portion, size_t index) {
  const BranchRun& run = portion.branches[index];
  const Layout& layout = portion.shard().map.layout();
  SpanLists lists;
  for (int64_t row = 0; row < portion.num_rows; ++row) {
    for (int64_t head = 0; head < run.num_selection_heads; ++head) {
      const size_t first = lists.spans.size();
      append_selected_spans(portion, run, row, head, lists.spans);
      localize(layout, rank.index, lists.spans, first);
      lists.close(/*joined=*/true);
    }
  }
  portion.selected_tokens +=
      total_length(lists.spans) * heads_of_a_list(portion, run.num_selection_heads);
  return attend_spans(rank,
                      portion,
                      {.num_rows = portion.num_rows,
                       .row_query = nullptr,
                       .num_selection_heads = run.num_selection_heads,
                       .lists = &lists,
                       .out = portion.out + index * portion.out_size(),
                       .lse = portion.lse + index * portion.row_heads()});
}

// A branch of spans answers in parts: first every row with the static mask, then every row with its
// best span, its second best, ...
Status attend_span_branch(Rank& rank, Portion& portion) {
  const BranchRun& run = portion.branches[0];
  const Layout& layout = portion.shard().map.layout();
  const int64_t num_rows = portion.num_rows * portion.num_parts;
  LONGSPAN_ASSIGN_OR_RETURN(int64_t * row_query,
                            rank.arena.allocate<int64_t>(static_cast<size_t>(num_rows)));
  SpanLists lists;
  for (int64_t part = 0; part < portion.num_parts; ++part) {
    for (int64_t row = 0; row < portion.num_rows; ++row) {
      row_query[part * portion.num_rows + row] = row;
      for (int64_t head = 0; head < run.num_selection_heads; ++head) {
        const size_t first = lists.spans.size();
        if (part == 0) {
          append_static_spans(*run.branch, portion.position(row), lists.spans);
        } else {
          lists.spans.push_back(winner_tokens(portion, run, row, head, part - 1));
        }
        localize(layout, rank.index, lists.spans, first);
        lists.close(/*joined=*/true);
      }
    }
  }
  portion.selected_tokens +=
      total_length(lists.spans) * heads_of_a_list(portion, run.num_selection_heads);
  return attend_spans(rank,
                      portion,
                      {.num_rows = num_rows,
                       .row_query = row_query,
                       .num_selection_heads = run.num_selection_heads,
                       .lists = &lists,
                       .out = portion.out,
                       .lse = portion.lse});
}

}  // namespace

Status attend_spans(Rank& rank, const Portion& portion, const TokenAttention& attention) {
  const ContextShape& shape = portion.shape();
  const LayerShard& layer = portion.state->layer();
  AttendParams params;
  params.query = portion.query;
  params.row_query = attention.row_query;
  params.num_rows = attention.num_rows;
  params.num_query_heads = shape.num_query_heads;
  params.kv = rank.store.view(portion.shard(),
                              portion.state->task->layer,
                              0,
                              portion.shard().map.num_entries(0, layer.visible));
  params.num_selection_heads = attention.num_selection_heads;
  params.span_offsets = attention.lists->offsets.data();
  params.spans = attention.lists->spans.data();
  params.scale = shape.scale;
  params.soft_cap = shape.soft_cap;
  params.out = attention.out;
  params.lse = attention.lse;
  return rank.backend->attend(params, rank.stream);
}

Status attend_to_tokens(Rank& rank, Round& round) {
  for (Portion& portion : round) {
    for (size_t i = 0; i < portion.branches.size(); ++i) {
      const Branch& branch = *portion.branches[i].branch;
      if (branch.source == BranchSource::kSummaries) {
        continue;
      }
      LONGSPAN_RETURN_IF_ERROR(branch.selection.spans ? attend_span_branch(rank, portion)
                                                      : attend_branch(rank, portion, i));
    }
  }
  return absl::OkStatus();
}

}  // namespace longspan
