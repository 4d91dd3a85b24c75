#include "worker/select.h"

#include <algorithm>

#include "kernels/anchors.h"
#include "worker/log_sum_exp.h"
#include "worker/selection.h"

namespace longspan {
namespace {

bool is_normalised(const Branch& branch) {
  return branch.needs_search() && branch.search.normalise == Normalise::kSoftmax;
}

Status count_winners(Rank& rank, Portion& portion, BranchRun& run) {
  LONGSPAN_ASSIGN_OR_RETURN(int64_t * k,
                            rank.arena.allocate<int64_t>(static_cast<size_t>(portion.num_rows)));
  const Phase phase = portion.state->task->phase;
  for (int64_t row = 0; row < portion.num_rows; ++row) {
    const int64_t position = portion.position(row);
    if (run.branch->selection.spans) {
      const auto anchors = rank.anchors(run.branch->search).offsets(position).size();
      k[row] = span_budget(*run.branch, phase, static_cast<int64_t>(anchors));
    } else {
      k[row] = block_choice(*run.branch, phase, position).k;
    }
    run.max_k = std::max(run.max_k, k[row]);
  }
  run.k = k;
  return absl::OkStatus();
}

Status prepare_portion(Rank& rank, Portion& portion) {
  const ContextShape& shape = portion.shape();
  for (const Branch& branch : portion.method().branches) {
    BranchRun& run = portion.branches.emplace_back();
    run.branch = &branch;
    ++portion.num_parts;
    if (branch.needs_search()) {
      run.num_selection_heads =
          num_selection_heads(branch.search, shape.num_query_heads, shape.num_kv_heads);
      LONGSPAN_RETURN_IF_ERROR(count_winners(rank, portion, run));
      portion.num_parts += branch.selection.spans ? run.max_k : 0;
    }
  }
  const auto parts = static_cast<size_t>(portion.num_parts);
  LONGSPAN_ASSIGN_OR_RETURN(portion.out, rank.arena.allocate<float>(parts * portion.out_size()));
  LONGSPAN_ASSIGN_OR_RETURN(portion.lse, rank.arena.allocate<float>(parts * portion.row_heads()));
  return absl::OkStatus();
}

// The summaries of a portion that are attended to, each once.
Status list_summaries(Rank& rank, Portion& portion) {
  const ShardMap& map = portion.shard().map;
  for (size_t i = 0; i < portion.branches.size(); ++i) {
    const Branch& branch = *portion.branches[i].branch;
    const bool answers = branch.source == BranchSource::kSummaries;
    if (!answers && !is_normalised(branch)) {
      continue;
    }
    const int summary = map.find_summary(branch.summary);
    SummaryRun* run = portion.find_summary(summary);
    if (run == nullptr) {
      run = &portion.summaries.emplace_back();
      run->summary = summary;
    }
    run->is_normaliser = run->is_normaliser || !answers;
    if (answers && run->out == nullptr) {
      run->out = portion.out + i * portion.out_size();
      run->lse = portion.lse + i * portion.row_heads();
    }
  }
  for (SummaryRun& run : portion.summaries) {
    if (run.lse == nullptr) {
      LONGSPAN_ASSIGN_OR_RETURN(run.lse, rank.arena.allocate<float>(portion.row_heads()));
    }
    LONGSPAN_ASSIGN_OR_RETURN(int64_t * visible,
                              rank.arena.allocate<int64_t>(static_cast<size_t>(portion.num_rows)));
    const int stream = map.summary_stream(run.summary);
    for (int64_t row = 0; row < portion.num_rows; ++row) {
      visible[row] = map.num_entries(stream, portion.position(row) + 1);
    }
    run.visible_entries = visible;
  }
  return absl::OkStatus();
}

PagedView summary_view(Rank& rank, const Portion& portion, int stream) {
  const LayerShard& layer = portion.state->layer();
  return rank.store.view(portion.shard(),
                         portion.state->task->layer,
                         stream,
                         portion.shard().map.num_entries(stream, layer.visible));
}

Status attend_to_summary(Rank& rank, Portion& portion, const SummaryRun& run) {
  const auto rows = static_cast<size_t>(portion.num_rows);
  LONGSPAN_ASSIGN_OR_RETURN(int64_t * offsets, rank.arena.allocate<int64_t>(rows + 1));
  LONGSPAN_ASSIGN_OR_RETURN(Span * spans, rank.arena.allocate<Span>(rows));
  offsets[0] = 0;
  for (size_t row = 0; row < rows; ++row) {
    const bool is_empty = run.visible_entries[row] == 0;
    spans[offsets[row]] = {0, run.visible_entries[row]};
    offsets[row + 1] = offsets[row] + (is_empty ? 0 : 1);
    portion.selected_tokens +=
        run.out == nullptr ? 0 : run.visible_entries[row] * portion.shape().num_query_heads;
  }
  AttendParams params;
  params.query = portion.query;
  params.num_rows = portion.num_rows;
  params.num_query_heads = portion.shape().num_query_heads;
  params.kv = summary_view(rank, portion, portion.shard().map.summary_stream(run.summary));
  params.span_offsets = offsets;
  params.spans = spans;
  params.scale = portion.shape().scale;
  params.soft_cap = portion.shape().soft_cap;
  params.out = run.out;
  params.lse = run.lse;
  return rank.backend->attend(params, rank.stream);
}

// A second branch that answers with the same summaries takes the first one's answer.
void share_answers(Portion& portion) {
  for (size_t i = 0; i < portion.branches.size(); ++i) {
    const Branch& branch = *portion.branches[i].branch;
    if (branch.source != BranchSource::kSummaries) {
      continue;
    }
    const SummaryRun* run = portion.find_summary(portion.shard().map.find_summary(branch.summary));
    float* out = portion.out + i * portion.out_size();
    if (out != run->out) {
      std::copy_n(run->out, portion.out_size(), out);
      std::copy_n(run->lse, portion.row_heads(), portion.lse + i * portion.row_heads());
    }
  }
}

Status exchange_normalisers(Rank& rank, Round& round) {
  size_t count = 0;
  for (const Portion& portion : round) {
    for (const SummaryRun& run : portion.summaries) {
      count += run.is_normaliser ? portion.row_heads() : 0;
    }
  }
  if (count == 0) {
    return absl::OkStatus();
  }
  const auto ranks = static_cast<size_t>(rank.size());
  LONGSPAN_ASSIGN_OR_RETURN(float* own, rank.arena.allocate<float>(count));
  LONGSPAN_ASSIGN_OR_RETURN(float* all, rank.arena.allocate<float>(count * ranks));
  float* next = own;
  for (Portion& portion : round) {
    for (SummaryRun& run : portion.summaries) {
      if (run.is_normaliser) {
        std::copy_n(run.lse, portion.row_heads(), next);
        run.global_lse = next;
        next += portion.row_heads();
      }
    }
  }
  if (ranks == 1) {
    return absl::OkStatus();
  }
  LONGSPAN_RETURN_IF_ERROR(
      rank.data.all_gather(bytes_of(own, count * sizeof(float)),
                           writable_bytes_of(all, count * ranks * sizeof(float)),
                           Rank::exchange_deadline()));
  for (size_t i = 0; i < count; ++i) {
    own[i] = log_sum_exp(all + i, ranks, count);
  }
  return absl::OkStatus();
}

// Candidates of block search: local blocks of the rank.
Status set_block_candidates(Rank& rank,
                            const Portion& portion,
                            const Branch& branch,
                            SearchParams& params) {
  const auto rows = static_cast<size_t>(portion.num_rows);
  LONGSPAN_ASSIGN_OR_RETURN(int64_t * begin, rank.arena.allocate<int64_t>(rows));
  LONGSPAN_ASSIGN_OR_RETURN(int64_t * end, rank.arena.allocate<int64_t>(rows));
  const int64_t block = branch.selection.block_tokens;
  for (size_t row = 0; row < rows; ++row) {
    const BlockChoice choice = block_choice(
        branch, portion.state->task->phase, portion.position(static_cast<int64_t>(row)));
    const Span tokens{choice.candidates.begin * block, choice.candidates.end * block};
    const Span local = to_local(portion.shard().map.layout(), rank.index, tokens);
    begin[row] = local.begin / block;
    end[row] = local.end / block;
  }
  params.candidate_begin = begin;
  params.candidate_end = end;
  return absl::OkStatus();
}

void set_importance(Rank& rank, Portion& portion, const Branch& branch, SearchParams& params) {
  const ShardMap& map = portion.shard().map;
  const int summary = map.find_summary(branch.summary);
  const SummaryRun* run = portion.find_summary(summary);
  params.summary = &branch.summary;
  params.block_tokens = branch.selection.block_tokens;
  params.visible_entries = run->visible_entries;
  params.lse = run->global_lse;
  const int halo = map.halo_stream(summary);
  if (halo >= 0) {
    params.halo = summary_view(rank, portion, halo);
    params.stripe_tokens = map.layout().stripe_tokens;
  }
  params.starts_context = map.layout().owner(0) == rank.index;
}

// Candidates of span search: the rank's tokens among the anchors, ascending.
Status set_anchor_candidates(Rank& rank,
                             const Portion& portion,
                             const Branch& branch,
                             SearchParams& params) {
  const Layout& layout = portion.shard().map.layout();
  AnchorTable& table = rank.anchors(branch.search);
  const auto rows = static_cast<size_t>(portion.num_rows);
  LONGSPAN_ASSIGN_OR_RETURN(int64_t * offsets, rank.arena.allocate<int64_t>(rows + 1));
  size_t total = 0;
  for (size_t row = 0; row < rows; ++row) {
    total += table.offsets(portion.position(static_cast<int64_t>(row))).size();
  }
  LONGSPAN_ASSIGN_OR_RETURN(int64_t * candidates, rank.arena.allocate<int64_t>(total));
  int64_t count = 0;
  for (size_t row = 0; row < rows; ++row) {
    offsets[row] = count;
    const int64_t position = portion.position(static_cast<int64_t>(row));
    const std::span<const int64_t> distances = table.offsets(position);
    for (auto distance = distances.rbegin(); distance != distances.rend(); ++distance) {
      const int64_t anchor = position + 1 - *distance;
      if (layout.num_ranks == 1) {
        candidates[count++] = anchor;
      } else if (layout.owner(anchor) == rank.index) {
        candidates[count++] = layout.local_length(rank.index, anchor);
      }
    }
  }
  offsets[rows] = count;
  params.candidates = candidates;
  params.candidate_offsets = offsets;
  return absl::OkStatus();
}

Status search_branch(Rank& rank, Portion& portion, BranchRun& run) {
  const Branch& branch = *run.branch;
  const ShardMap& map = portion.shard().map;
  SearchParams params;
  params.spec = &branch.search;
  params.query =
      branch.search.query == QuerySource::kSupplied ? portion.search_query : portion.query;
  params.num_rows = portion.num_rows;
  params.num_query_heads = portion.shape().num_query_heads;
  params.scale = portion.shape().scale;
  params.soft_cap = portion.shape().soft_cap;
  int64_t unit = 1;  // tokens of a candidate
  if (branch.selection.spans) {
    params.view = summary_view(rank, portion, 0);
    LONGSPAN_RETURN_IF_ERROR(set_anchor_candidates(rank, portion, branch, params));
  } else {
    unit = branch.selection.block_tokens;
    params.view = summary_view(rank, portion, map.summary_stream(map.find_summary(branch.summary)));
    LONGSPAN_RETURN_IF_ERROR(set_block_candidates(rank, portion, branch, params));
    if (is_normalised(branch)) {
      set_importance(rank, portion, branch, params);
    }
  }
  params.k = run.k;
  params.max_k = run.max_k;
  params.scores = run.scores;
  params.ids = run.ids;
  LONGSPAN_RETURN_IF_ERROR(rank.backend->search(params, rank.stream));

  const Layout& layout = map.layout();
  const int64_t places = portion.num_rows * run.num_selection_heads * run.max_k;
  for (int64_t i = 0; i < places && layout.num_ranks > 1; ++i) {
    if (run.ids[i] >= 0) {
      run.ids[i] = layout.global_position(rank.index, run.ids[i] * unit) / unit;
    }
  }
  return absl::OkStatus();
}

// Winners of every branch of a round in one block: all ids, then all scores.
size_t num_places(const Portion& portion, const BranchRun& run) {
  return static_cast<size_t>(portion.num_rows * run.num_selection_heads * run.max_k);
}

void merge_branch(const Portion& portion,
                  BranchRun& run,
                  std::span<const float* const> scores,
                  std::span<const int64_t* const> ids) {
  std::vector<const float*> row_scores(scores.size());
  std::vector<const int64_t*> row_ids(ids.size());
  const CandidateLists lists{static_cast<int>(scores.size()), row_scores.data(), row_ids.data()};
  for (int64_t row = 0; row < portion.num_rows; ++row) {
    for (int64_t head = 0; head < run.num_selection_heads; ++head) {
      const int64_t first = (row * run.num_selection_heads + head) * run.max_k;
      for (size_t list = 0; list < scores.size(); ++list) {
        row_scores[list] = scores[list] + first;
        row_ids[list] = ids[list] + first;
      }
      merge_candidates(lists, run.max_k, run.k[row], run.scores + first, run.ids + first);
    }
  }
}

Status exchange_candidates(Rank& rank,
                           Round& round,
                           std::span<const std::byte> own,
                           size_t places) {
  const auto ranks = static_cast<size_t>(rank.size());
  LONGSPAN_ASSIGN_OR_RETURN(std::span<std::byte> all,
                            rank.arena.allocate_span<std::byte>(own.size() * ranks));
  LONGSPAN_RETURN_IF_ERROR(rank.data.all_gather(own, all, Rank::exchange_deadline()));
  std::vector<const int64_t*> ids(ranks);
  std::vector<const float*> scores(ranks);
  for (size_t peer = 0; peer < ranks; ++peer) {
    const std::byte* block = all.data() + peer * own.size();
    ids[peer] = reinterpret_cast<const int64_t*>(block);
    scores[peer] = reinterpret_cast<const float*>(block + places * sizeof(int64_t));
  }
  for (Portion& portion : round) {
    for (BranchRun& run : portion.branches) {
      if (run.max_k == 0) {
        continue;
      }
      merge_branch(portion, run, scores, ids);
      for (size_t peer = 0; peer < ranks; ++peer) {
        ids[peer] += num_places(portion, run);
        scores[peer] += num_places(portion, run);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

Status prepare_portions(Rank& rank, Round& round) {
  for (Portion& portion : round) {
    LONGSPAN_RETURN_IF_ERROR(prepare_portion(rank, portion));
  }
  return absl::OkStatus();
}

Status attend_to_summaries(Rank& rank, Round& round) {
  for (Portion& portion : round) {
    LONGSPAN_RETURN_IF_ERROR(list_summaries(rank, portion));
    for (const SummaryRun& run : portion.summaries) {
      LONGSPAN_RETURN_IF_ERROR(attend_to_summary(rank, portion, run));
    }
    share_answers(portion);
  }
  return exchange_normalisers(rank, round);
}

Status search_candidates(Rank& rank, Round& round) {
  size_t places = 0;
  for (const Portion& portion : round) {
    for (const BranchRun& run : portion.branches) {
      places += num_places(portion, run);
    }
  }
  if (places == 0) {
    return absl::OkStatus();
  }
  // An even number of scores keeps the next rank's ids aligned; the spare one is sent too.
  const size_t block_bytes = places * sizeof(int64_t) + (places + places % 2) * sizeof(float);
  LONGSPAN_ASSIGN_OR_RETURN(std::span<std::byte> own,
                            rank.arena.allocate_span<std::byte>(block_bytes));
  auto* ids = reinterpret_cast<int64_t*>(own.data());
  auto* scores = reinterpret_cast<float*>(own.data() + places * sizeof(int64_t));
  scores[places - 1 + places % 2] = 0;
  for (Portion& portion : round) {
    for (BranchRun& run : portion.branches) {
      if (run.max_k > 0) {
        run.ids = ids;
        run.scores = scores;
        ids += num_places(portion, run);
        scores += num_places(portion, run);
        LONGSPAN_RETURN_IF_ERROR(search_branch(rank, portion, run));
      }
    }
  }
  return rank.size() == 1 ? absl::OkStatus() : exchange_candidates(rank, round, own, places);
}

}  // namespace longspan
