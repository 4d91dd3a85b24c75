#include "worker/compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "worker/attend.h"
#include "worker/log_sum_exp.h"
#include "worker/reduce.h"
#include "worker/selection.h"

namespace longspan {
namespace {

bool wants_selection(const Portion& portion) {
  return portion.state->task->return_selection || portion.state->task->compare_with_dense;
}

bool is_reported(const BranchRun& run) { return run.branch->source == BranchSource::kTokens; }

// Cuts [tokens.begin, tokens.end) where another rank goes on.
void append_by_rank(const Layout& layout,
                    Span tokens,
                    std::optional<float> score,
                    std::vector<SelectedSpan>& spans) {
  while (tokens.begin < tokens.end) {
    const int64_t end =
        layout.num_ranks == 1 ? tokens.end : std::min(tokens.end, layout.stripe_end(tokens.begin));
    spans.push_back({layout.owner(tokens.begin), tokens.begin, end, score, std::nullopt});
    tokens.begin = end;
  }
}

// Appends the parts of `spans` (coalesced) outside `taken` (coalesced).
std::vector<Span> without(const std::vector<Span>& spans, const std::vector<Span>& taken) {
  std::vector<Span> rest;
  for (Span span : spans) {
    for (const Span& hole : taken) {
      if (hole.end <= span.begin || hole.begin >= span.end) {
        continue;
      }
      if (hole.begin > span.begin) {
        rest.push_back({span.begin, hole.begin});
      }
      span.begin = std::min(hole.end, span.end);
    }
    if (span.begin < span.end) {
      rest.push_back(span);
    }
  }
  return rest;
}

// The spans of one row and selection head: winners with their scores, and what the static mask and
// forced blocks add, in order of tokens. Winners that are spans may overlap one another.
std::vector<SelectedSpan> reported_spans(const Portion& portion,
                                         const BranchRun& run,
                                         int64_t row,
                                         int64_t head) {
  const Layout& layout = portion.shard().map.layout();
  std::vector<SelectedSpan> reported;
  std::vector<Span> winners;
  for (int64_t place = 0; place < run.max_k; ++place) {
    const Span tokens = winner_tokens(portion, run, row, head, place);
    if (tokens.begin == tokens.end) {
      break;
    }
    const int64_t first = (row * run.num_selection_heads + head) * run.max_k;
    append_by_rank(layout, tokens, run.scores[first + place], reported);
    winners.push_back(tokens);
  }
  coalesce(winners);
  std::vector<Span> fixed;
  append_static_spans(*run.branch, portion.position(row), fixed);
  coalesce(fixed);
  for (const Span& span : without(fixed, winners)) {
    append_by_rank(layout, span, std::nullopt, reported);
  }
  std::sort(reported.begin(), reported.end(), [](const SelectedSpan& a, const SelectedSpan& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  return reported;
}

int64_t distinct_tokens(const std::vector<SelectedSpan>& spans) {
  std::vector<Span> tokens;
  tokens.reserve(spans.size());
  for (const SelectedSpan& span : spans) {
    tokens.push_back({span.begin, span.end});
  }
  coalesce(tokens);
  return total_length(tokens);
}

int64_t list_of_head(const Portion& portion, const BranchRun& run, int64_t query_head) {
  return query_head * run.num_selection_heads / portion.shape().num_query_heads;
}

void report_portion(const Portion& portion) {
  AttendResult& result = *portion.state->io->result;
  for (int64_t row = 0; row < portion.num_rows; ++row) {
    for (int head = 0; head < portion.shape().num_query_heads; ++head) {
      for (size_t branch = 0; branch < portion.branches.size(); ++branch) {
        const BranchRun& run = portion.branches[branch];
        RowSelection& selection = result.selections.emplace_back();
        selection.position = portion.position(row);
        selection.query_head = head;
        selection.branch = static_cast<int>(branch);
        if (is_reported(run)) {
          selection.spans = reported_spans(portion, run, row, list_of_head(portion, run, head));
          selection.num_tokens = distinct_tokens(selection.spans);
        }
      }
    }
  }
}

// What a comparison computes on each rank, as one run of floats:
//   dense out [R][H][E], dense lse [R][H], lse of all selected tokens [R][H],
//   and for each branch over tokens the lse of its reported spans [virtual rows][H].
// A branch has as many virtual rows for row r as the longest of its heads' lists in that row.
struct BranchSpans {
  const BranchRun* run = nullptr;
  std::vector<int64_t> row_query;                // by virtual row
  std::vector<std::vector<SelectedSpan>> lists;  // by row and selection head
  std::vector<int64_t> first_virtual_row;        // by row
  int64_t num_virtual_rows() const { return static_cast<int64_t>(row_query.size()); }
};

class Comparison {
 public:
  Comparison(Rank& rank, Portion& portion) : rank_(rank), portion_(portion) {
    for (const BranchRun& run : portion.branches) {
      if (is_reported(run)) {
        add_branch(run);
      }
    }
  }

  size_t num_floats() const {
    size_t count = portion_.out_size() + 2 * portion_.row_heads();
    for (const BranchSpans& branch : branches_) {
      count += static_cast<size_t>(branch.num_virtual_rows()) * heads();
    }
    return count;
  }

  Status compute(float* out) {
    float* dense_lse = out + portion_.out_size();
    float* union_lse = dense_lse + portion_.row_heads();
    float* span_lse = union_lse + portion_.row_heads();
    LONGSPAN_RETURN_IF_ERROR(attend_densely(out, dense_lse));
    LONGSPAN_RETURN_IF_ERROR(attend_to_union(union_lse));
    for (const BranchSpans& branch : branches_) {
      LONGSPAN_RETURN_IF_ERROR(attend_to_spans(branch, span_lse));
      span_lse += static_cast<size_t>(branch.num_virtual_rows()) * heads();
    }
    return absl::OkStatus();
  }

  // On the lead: `parts` are every rank's floats.
  Status finish(std::span<const float* const> parts) {
    AttendResult& result = *portion_.state->io->result;
    const size_t rows = portion_.row_heads();
    const auto value_dim = static_cast<size_t>(portion_.shape().value_dim);
    LONGSPAN_ASSIGN_OR_RETURN(std::span<float> dense,
                              rank_.arena.allocate_span<float>(portion_.out_size()));
    LONGSPAN_RETURN_IF_ERROR(merge_dense(parts, dense.data()));
    std::vector<float> dense_lse(rows);
    for (size_t i = 0; i < rows; ++i) {
      dense_lse[i] = joined(parts, portion_.out_size() + i);
      const float selected = joined(parts, portion_.out_size() + rows + i);
      result.recall.push_back(share(selected, dense_lse[i]));
      const size_t first =
          static_cast<size_t>(portion_.first_row) * heads() * value_dim + i * value_dim;
      result.relative_error.push_back(distance(std::span(result.out).subspan(first, value_dim),
                                               dense.subspan(i * value_dim, value_dim)));
    }
    set_masses(parts, dense_lse);
    return absl::OkStatus();
  }

 private:
  size_t heads() const { return static_cast<size_t>(portion_.shape().num_query_heads); }
  const Layout& layout() const { return portion_.shard().map.layout(); }

  void add_branch(const BranchRun& run) {
    BranchSpans& branch = branches_.emplace_back();
    branch.run = &run;
    for (int64_t row = 0; row < portion_.num_rows; ++row) {
      size_t longest = 0;
      for (int64_t head = 0; head < run.num_selection_heads; ++head) {
        branch.lists.push_back(reported_spans(portion_, run, row, head));
        longest = std::max(longest, branch.lists.back().size());
      }
      branch.first_virtual_row.push_back(branch.num_virtual_rows());
      branch.row_query.insert(branch.row_query.end(), longest, row);
    }
  }

  Status attend_densely(float* out, float* lse) {
    SpanLists lists;
    for (int64_t row = 0; row < portion_.num_rows; ++row) {
      lists.spans.push_back(to_local(layout(), rank_.index, {0, portion_.position(row) + 1}));
      lists.close(/*joined=*/true);
    }
    return attend_spans(
        rank_, portion_, {.num_rows = portion_.num_rows, .lists = &lists, .out = out, .lse = lse});
  }

  Status attend_to_union(float* lse) {
    SpanLists lists;
    for (int64_t row = 0; row < portion_.num_rows; ++row) {
      for (int head = 0; head < portion_.shape().num_query_heads; ++head) {
        const size_t first = lists.spans.size();
        for (const BranchSpans& branch : branches_) {
          const int64_t list = list_of_head(portion_, *branch.run, head);
          append_selected_spans(portion_, *branch.run, row, list, lists.spans);
        }
        for (size_t i = first; i < lists.spans.size(); ++i) {
          lists.spans[i] = to_local(layout(), rank_.index, lists.spans[i]);
        }
        lists.close(/*joined=*/true);
      }
    }
    return attend_spans(rank_,
                        portion_,
                        {.num_rows = portion_.num_rows,
                         .num_selection_heads = portion_.shape().num_query_heads,
                         .lists = &lists,
                         .lse = lse});
  }

  Status attend_to_spans(const BranchSpans& branch, float* lse) {
    const int heads_of_branch = branch.run->num_selection_heads;
    SpanLists lists;
    for (int64_t virtual_row = 0; virtual_row < branch.num_virtual_rows(); ++virtual_row) {
      const int64_t row = branch.row_query[static_cast<size_t>(virtual_row)];
      const auto place =
          static_cast<size_t>(virtual_row - branch.first_virtual_row[static_cast<size_t>(row)]);
      for (int64_t head = 0; head < heads_of_branch; ++head) {
        const auto& list = branch.lists[static_cast<size_t>(row * heads_of_branch + head)];
        if (place < list.size()) {
          lists.spans.push_back(
              to_local(layout(), rank_.index, {list[place].begin, list[place].end}));
        }
        lists.close(/*joined=*/true);
      }
    }
    return attend_spans(rank_,
                        portion_,
                        {.num_rows = branch.num_virtual_rows(),
                         .row_query = branch.row_query.data(),
                         .num_selection_heads = heads_of_branch,
                         .lists = &lists,
                         .lse = lse});
  }

  static float joined(std::span<const float* const> parts, size_t index) {
    std::vector<float> values;
    for (const float* part : parts) {
      values.push_back(part[index]);
    }
    return log_sum_exp(values.data(), values.size(), 1);
  }

  static float share(float lse, float dense_lse) {
    return std::isinf(dense_lse) ? 0.0F : std::exp(lse - dense_lse);
  }

  // |a - b| / |b|; 0 where both are zero.
  static float distance(std::span<const float> a, std::span<const float> b) {
    double difference = 0;
    double length = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
      length += static_cast<double>(b[i]) * b[i];
    }
    return difference == 0 ? 0.0F : static_cast<float>(std::sqrt(difference / length));
  }

  Status merge_dense(std::span<const float* const> parts, float* out) {
    std::vector<const float*> lses;
    for (const float* part : parts) {
      lses.push_back(part + portion_.out_size());
    }
    LONGSPAN_ASSIGN_OR_RETURN(float* lse, rank_.arena.allocate<float>(portion_.row_heads()));
    LONGSPAN_ASSIGN_OR_RETURN(const float* sinks, sink_rows(rank_, portion_, portion_.row_heads()));
    MergeParams params;
    params.num_parts = static_cast<int>(parts.size());
    params.part_out = parts.data();
    params.part_lse = lses.data();
    params.sink_logits = sinks;
    params.num_rows = static_cast<int64_t>(portion_.row_heads());
    params.value_dim = portion_.shape().value_dim;
    params.out = out;
    params.lse = lse;
    return rank_.backend->merge(params, rank_.stream);
  }

  void set_masses(std::span<const float* const> parts, const std::vector<float>& dense_lse) {
    AttendResult& result = *portion_.state->io->result;
    const size_t num_branches = portion_.branches.size();
    const size_t first_selection = result.selections.size() - portion_.row_heads() * num_branches;
    size_t offset = portion_.out_size() + 2 * portion_.row_heads();
    for (const BranchSpans& branch : branches_) {
      const auto index = static_cast<size_t>(branch.run - portion_.branches.data());
      for (size_t i = 0; i < portion_.row_heads(); ++i) {
        RowSelection& selection = result.selections[first_selection + i * num_branches + index];
        const auto first =
            static_cast<size_t>(branch.first_virtual_row[i / heads()]) * heads() + i % heads();
        for (size_t place = 0; place < selection.spans.size(); ++place) {
          const float lse = joined(parts, offset + first + place * heads());
          selection.spans[place].mass = share(lse, dense_lse[i]);
        }
      }
      offset += static_cast<size_t>(branch.num_virtual_rows()) * heads();
    }
  }

  Rank& rank_;
  Portion& portion_;
  std::vector<BranchSpans> branches_;
};

// Every rank's floats at the lead, [ranks].
StatusOr<std::vector<const float*>> gather_floats(Rank& rank, std::span<const float> own) {
  if (rank.size() == 1) {
    return std::vector<const float*>{own.data()};
  }
  const auto ranks = static_cast<size_t>(rank.size());
  std::vector<int64_t> send_sizes(ranks, 0);
  send_sizes[0] = static_cast<int64_t>(own.size_bytes());
  std::vector<int64_t> receive_sizes(ranks, rank.is_lead() ? send_sizes[0] : 0);
  LONGSPAN_ASSIGN_OR_RETURN(
      std::span<float> all,
      rank.arena.allocate_span<float>(rank.is_lead() ? own.size() * ranks : 0));
  LONGSPAN_RETURN_IF_ERROR(rank.data.all_to_all(std::as_bytes(own),
                                                send_sizes,
                                                std::as_writable_bytes(all),
                                                receive_sizes,
                                                Rank::exchange_deadline()));
  std::vector<const float*> parts;
  for (size_t peer = 0; peer < ranks && rank.is_lead(); ++peer) {
    parts.push_back(all.data() + peer * own.size());
  }
  return parts;
}

}  // namespace

void report_selections(Rank& rank, Round& round) {
  for (const Portion& portion : round) {
    if (rank.is_lead() && wants_selection(portion)) {
      report_portion(portion);
    }
  }
}

Status compare_with_dense(Rank& rank, Round& round) {
  for (Portion& portion : round) {
    if (!portion.state->task->compare_with_dense) {
      continue;
    }
    Comparison comparison(rank, portion);
    LONGSPAN_ASSIGN_OR_RETURN(std::span<float> own,
                              rank.arena.allocate_span<float>(comparison.num_floats()));
    LONGSPAN_RETURN_IF_ERROR(comparison.compute(own.data()));
    LONGSPAN_ASSIGN_OR_RETURN(const std::vector<const float*> parts, gather_floats(rank, own));
    if (rank.is_lead()) {
      LONGSPAN_RETURN_IF_ERROR(comparison.finish(parts));
    }
  }
  return absl::OkStatus();
}

}  // namespace longspan
