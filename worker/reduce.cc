#include "worker/reduce.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace longspan {
namespace {

// Partial answers up to this size, of all ranks together, go to the lead, which merges them; larger
// ones are cut by rows, so that every rank merges its slice.
constexpr int64_t kLeadMergeBytes = int64_t{1} << 20;

struct Slice {
  int64_t begin = 0;  // rows of the portion
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

size_t row_floats(const Portion& portion) {  // out of one row of one part
  return static_cast<size_t>(portion.shape().num_query_heads) *
         static_cast<size_t>(portion.shape().value_dim);
}
size_t row_lses(const Portion& portion) {
  return static_cast<size_t>(portion.shape().num_query_heads);
}

bool is_sliced(const Portion& portion, int num_ranks) {
  const auto part = static_cast<int64_t>(portion.out_size() + portion.row_heads());
  return num_ranks > 1 && portion.num_rows > 1 &&
         part * portion.num_parts * num_ranks * static_cast<int64_t>(sizeof(float)) >
             kLeadMergeBytes;
}

// The rows that `rank` merges.
Slice slice_of(const Portion& portion, int rank, int num_ranks) {
  if (!is_sliced(portion, num_ranks)) {
    return {0, rank == 0 ? portion.num_rows : 0};
  }
  return {portion.num_rows * rank / num_ranks, portion.num_rows * (rank + 1) / num_ranks};
}

// Partial answers that every rank sends to `rank`.
size_t partial_bytes(const Portion& portion, int rank, int num_ranks) {
  const int64_t rows = slice_of(portion, rank, num_ranks).size();
  return static_cast<size_t>(portion.num_parts * rows) * (row_floats(portion) + row_lses(portion)) *
         sizeof(float);
}

// Ahead of the partial answers in what goes to the lead: a report, and the selected tokens of each
// portion.
size_t header_bytes(const Round& round) {
  return sizeof(RankReport) + round.size() * sizeof(int64_t);
}

std::byte* put(std::byte* out, const void* data, size_t size) {
  if (size > 0) {
    std::memcpy(out, data, size);
  }
  return out + size;
}

std::byte* put_header(const Round& round, const RankReport& report, std::byte* out) {
  out = put(out, &report, sizeof report);
  for (const Portion& portion : round) {
    out = put(out, &portion.selected_tokens, sizeof portion.selected_tokens);
  }
  return out;
}

void add_report(const RankReport& report, size_t rank, GroupReport& group) {
  group.used_bytes[rank] = report.used_bytes;
  RankReport& slowest = group.slowest;
  slowest.scatter_seconds = std::max(slowest.scatter_seconds, report.scatter_seconds);
  slowest.select_seconds = std::max(slowest.select_seconds, report.select_seconds);
  slowest.compute_seconds = std::max(slowest.compute_seconds, report.compute_seconds);
  slowest.reduce_seconds = std::max(slowest.reduce_seconds, report.reduce_seconds);
}

void read_header(const std::byte* data, size_t rank, Round& round, GroupReport& group) {
  RankReport report;
  std::memcpy(&report, data, sizeof report);
  data += sizeof report;
  add_report(report, rank, group);
  for (Portion& portion : round) {
    int64_t selected = 0;
    std::memcpy(&selected, data, sizeof selected);
    data += sizeof selected;
    if (AttendResult* result = portion.state->io->result; result != nullptr) {
      result->selected_tokens += selected;
    }
  }
}

// Where the merger of a slice finds the partial answers, [parts][ranks]: outputs of the slice's
// rows, and their lses.
struct Partials {
  std::vector<const float*> out;
  std::vector<const float*> lse;

  void resize(int64_t num_parts, size_t num_ranks) {
    out.resize(static_cast<size_t>(num_parts) * num_ranks);
    lse.resize(out.size());
  }
};

// Answers of rows [slice.begin, slice.end): [rows][H][E] and, where the method has one, [rows][H].
struct Answer {
  float* out = nullptr;
  float* lse = nullptr;
};

// Merges the slice of one portion.
class Merger {
 public:
  Merger(Rank& rank, const Portion& portion, Slice slice, const Partials& partials)
      : rank_(rank),
        portion_(portion),
        slice_(slice),
        partials_(partials),
        num_ranks_(static_cast<size_t>(rank.size())),
        rows_(static_cast<size_t>(slice.size()) * row_lses(portion)) {}

  Status merge(Answer answer) {
    switch (portion_.method().merge) {
      case MergeKind::kLse:
        return merge_by_lse(answer);
      case MergeKind::kGates:
        return merge_by_gates(answer);
      case MergeKind::kSpanScores:
        return merge_by_span_scores(answer);
    }
    return absl::OkStatus();
  }

 private:
  struct Part {
    const float* out = nullptr;
    const float* lse = nullptr;
  };

  Status run(std::span<const Part> parts,
             const std::vector<const float*>* weights,
             const float* sinks,
             Answer answer) {
    std::vector<const float*> outs;
    std::vector<const float*> lses;
    for (const Part& part : parts) {
      outs.push_back(part.out);
      lses.push_back(part.lse);
    }
    MergeParams params;
    params.num_parts = static_cast<int>(parts.size());
    params.part_out = outs.data();
    params.part_lse = lses.data();
    params.weights = weights == nullptr ? nullptr : weights->data();
    params.sink_logits = sinks;
    params.num_rows = static_cast<int64_t>(rows_);
    params.value_dim = portion_.shape().value_dim;
    params.out = answer.out;
    params.lse = answer.lse;
    return rank_.backend->merge(params, rank_.stream);
  }

  std::vector<Part> parts_of_ranks(int64_t part) const {
    std::vector<Part> parts;
    const size_t first = static_cast<size_t>(part) * num_ranks_;
    for (size_t i = first; i < first + num_ranks_; ++i) {
      parts.push_back({partials_.out[i], partials_.lse[i]});
    }
    return parts;
  }

  StatusOr<Answer> new_answer() {
    Answer answer;
    const auto value_dim = static_cast<size_t>(portion_.shape().value_dim);
    LONGSPAN_ASSIGN_OR_RETURN(answer.out, rank_.arena.allocate<float>(rows_ * value_dim));
    LONGSPAN_ASSIGN_OR_RETURN(answer.lse, rank_.arena.allocate<float>(rows_));
    return answer;
  }

  // One part, over all ranks.
  StatusOr<Part> joined(int64_t part) {
    const std::vector<Part> parts = parts_of_ranks(part);
    if (parts.size() == 1) {
      return parts[0];
    }
    LONGSPAN_ASSIGN_OR_RETURN(const Answer answer, new_answer());
    LONGSPAN_RETURN_IF_ERROR(run(parts, nullptr, nullptr, answer));
    return Part{answer.out, answer.lse};
  }

  Status merge_by_lse(Answer answer) {
    std::vector<Part> parts;
    for (int64_t part = 0; part < portion_.num_parts; ++part) {
      const std::vector<Part> of_part = parts_of_ranks(part);
      parts.insert(parts.end(), of_part.begin(), of_part.end());
    }
    LONGSPAN_ASSIGN_OR_RETURN(const float* sinks, sink_rows(rank_, portion_, rows_));
    return run(parts, nullptr, sinks, answer);
  }

  Status merge_by_gates(Answer answer) {
    const size_t branches = portion_.method().branches.size();
    const size_t heads = row_lses(portion_);
    const float* gates = portion_.gates + static_cast<size_t>(slice_.begin) * heads * branches;
    std::vector<Part> parts;
    std::vector<const float*> weights;
    for (size_t branch = 0; branch < branches; ++branch) {
      LONGSPAN_ASSIGN_OR_RETURN(const Part part, joined(static_cast<int64_t>(branch)));
      parts.push_back(part);
      LONGSPAN_ASSIGN_OR_RETURN(float* weight, rank_.arena.allocate<float>(rows_));
      for (size_t i = 0; i < rows_; ++i) {
        weight[i] = gates[i * branches + branch];
      }
      weights.push_back(weight);
    }
    return run(parts, &weights, nullptr, answer);
  }

  // Every span is joined with the static mask first; then the answers are mixed by a softmax over
  // the spans' scores. Rows without spans take the static mask's answer.
  Status merge_by_span_scores(Answer answer) {
    LONGSPAN_ASSIGN_OR_RETURN(const Part mask, joined(0));
    std::vector<Part> parts{mask};
    LONGSPAN_ASSIGN_OR_RETURN(const std::vector<const float*> weights, span_weights());
    for (int64_t part = 1; part < portion_.num_parts; ++part) {
      LONGSPAN_ASSIGN_OR_RETURN(const Part span, joined(part));
      LONGSPAN_ASSIGN_OR_RETURN(const Answer both, new_answer());
      const Part pair[] = {mask, span};
      LONGSPAN_RETURN_IF_ERROR(run(pair, nullptr, nullptr, both));
      parts.push_back({both.out, both.lse});
    }
    return run(parts, &weights, nullptr, answer);
  }

  // Weights of the static mask alone and of each place, [parts] of [rows][H].
  StatusOr<std::vector<const float*>> span_weights() {
    const auto parts = static_cast<size_t>(portion_.num_parts);
    LONGSPAN_ASSIGN_OR_RETURN(float* weights, rank_.arena.allocate<float>(parts * rows_));
    const BranchRun& run = portion_.branches[0];
    const size_t heads = row_lses(portion_);
    const size_t heads_of_a_list = heads / static_cast<size_t>(run.num_selection_heads);
    for (size_t i = 0; i < rows_; ++i) {
      const size_t row = static_cast<size_t>(slice_.begin) + i / heads;
      const size_t list =
          row * static_cast<size_t>(run.num_selection_heads) + i % heads / heads_of_a_list;
      const size_t first = list * (parts - 1);
      weights[i] = parts == 1 || run.ids[first] < 0 ? 1.0F : 0.0F;
      double total = 0;
      for (size_t place = 0; place + 1 < parts && run.ids[first + place] >= 0; ++place) {
        total += span_weight(run.scores[first + place], run.scores[first]);
      }
      for (size_t place = 0; place + 1 < parts; ++place) {
        const bool is_span = run.ids[first + place] >= 0;
        weights[(place + 1) * rows_ + i] =
            is_span ? static_cast<float>(span_weight(run.scores[first + place], run.scores[first]) /
                                         total)
                    : 0.0F;
      }
    }
    std::vector<const float*> by_part;
    for (size_t part = 0; part < parts; ++part) {
      by_part.push_back(weights + part * rows_);
    }
    return by_part;
  }

  // Equal scores weigh the same, infinite ones too.
  static double span_weight(float score, float best) {
    return score == best ? 1.0 : std::exp(static_cast<double>(score) - best);
  }

  Rank& rank_;
  const Portion& portion_;
  const Slice slice_;
  const Partials& partials_;
  const size_t num_ranks_;
  const size_t rows_;  // of the slice, times heads
};

std::byte* put_partials(const Portion& portion, Slice slice, std::byte* out) {
  const auto begin = static_cast<size_t>(slice.begin);
  const auto rows = static_cast<size_t>(slice.size());
  for (int64_t part = 0; part < portion.num_parts; ++part) {
    const auto index = static_cast<size_t>(part);
    const float* part_out = portion.out + index * portion.out_size();
    const float* part_lse = portion.lse + index * portion.row_heads();
    out = put(
        out, part_out + begin * row_floats(portion), rows * row_floats(portion) * sizeof(float));
    out = put(out, part_lse + begin * row_lses(portion), rows * row_lses(portion) * sizeof(float));
  }
  return out;
}

// Notes where the partial answers of a peer lie.
void read_partials(const Rank& rank,
                   const Round& round,
                   size_t peer,
                   const std::byte* data,
                   std::vector<Partials>& partials) {
  const auto ranks = static_cast<size_t>(rank.size());
  for (size_t i = 0; i < round.size(); ++i) {
    const Portion& portion = round[i];
    const auto rows = static_cast<size_t>(slice_of(portion, rank.index, rank.size()).size());
    partials[i].resize(portion.num_parts, ranks);
    for (size_t part = 0; part < static_cast<size_t>(portion.num_parts); ++part) {
      partials[i].out[part * ranks + peer] = reinterpret_cast<const float*>(data);
      data += rows * row_floats(portion) * sizeof(float);
      partials[i].lse[part * ranks + peer] = reinterpret_cast<const float*>(data);
      data += rows * row_lses(portion) * sizeof(float);
    }
  }
}

// The partial answers that this rank merges, by portion; the lead reads the headers too.
StatusOr<std::vector<Partials>> exchange_partials(Rank& rank,
                                                  Round& round,
                                                  const RankReport& report,
                                                  GroupReport* reports) {
  const auto ranks = static_cast<size_t>(rank.size());
  std::vector<int64_t> send_sizes(ranks);
  std::vector<int64_t> receive_sizes(ranks);
  size_t total_send = 0;
  for (size_t peer = 0; peer < ranks; ++peer) {
    size_t send = peer == 0 ? header_bytes(round) : 0;
    size_t receive = rank.is_lead() ? header_bytes(round) : 0;
    for (const Portion& portion : round) {
      send += partial_bytes(portion, static_cast<int>(peer), rank.size());
      receive += partial_bytes(portion, rank.index, rank.size());
    }
    send_sizes[peer] = static_cast<int64_t>(send);
    receive_sizes[peer] = static_cast<int64_t>(receive);
    total_send += send;
  }
  const auto from_each = static_cast<size_t>(receive_sizes[0]);
  LONGSPAN_ASSIGN_OR_RETURN(std::span<std::byte> send,
                            rank.arena.allocate_span<std::byte>(total_send));
  LONGSPAN_ASSIGN_OR_RETURN(std::span<std::byte> received,
                            rank.arena.allocate_span<std::byte>(from_each * ranks));
  std::byte* next = put_header(round, report, send.data());
  for (size_t peer = 0; peer < ranks; ++peer) {
    for (const Portion& portion : round) {
      next = put_partials(portion, slice_of(portion, static_cast<int>(peer), rank.size()), next);
    }
  }
  LONGSPAN_RETURN_IF_ERROR(
      rank.data.all_to_all(send, send_sizes, received, receive_sizes, Rank::exchange_deadline()));

  std::vector<Partials> partials(round.size());
  for (size_t peer = 0; peer < ranks; ++peer) {
    const std::byte* data = received.data() + peer * from_each;
    if (rank.is_lead()) {
      read_header(data, peer, round, *reports);
      data += header_bytes(round);
    }
    read_partials(rank, round, peer, data, partials);
  }
  return partials;
}

// Where the answer of a slice goes: the caller's result on the lead, scratch memory elsewhere.
StatusOr<Answer> place_of_answer(Rank& rank, const Portion& portion, Slice slice) {
  const auto first = static_cast<size_t>(portion.first_row + slice.begin);
  const auto rows = static_cast<size_t>(slice.size());
  Answer answer;
  if (rank.is_lead()) {
    AttendResult& result = *portion.state->io->result;
    answer.out = result.out.data() + first * row_floats(portion);
    if (portion.method().has_lse()) {
      answer.lse = result.lse.data() + first * row_lses(portion);
      return answer;
    }
  } else {
    LONGSPAN_ASSIGN_OR_RETURN(answer.out, rank.arena.allocate<float>(rows * row_floats(portion)));
  }
  LONGSPAN_ASSIGN_OR_RETURN(answer.lse, rank.arena.allocate<float>(rows * row_lses(portion)));
  return answer;
}

size_t answer_bytes(const Portion& portion, int rank, int num_ranks) {
  const auto rows = static_cast<size_t>(slice_of(portion, rank, num_ranks).size());
  return rank == 0 ? 0 : rows * (row_floats(portion) + row_lses(portion)) * sizeof(float);
}

void read_answers(const Rank& rank, const Round& round, const std::byte* data) {
  for (int peer = 1; peer < rank.size(); ++peer) {
    for (const Portion& portion : round) {
      const Slice slice = slice_of(portion, peer, rank.size());
      const auto rows = static_cast<size_t>(slice.size());
      const auto first = static_cast<size_t>(portion.first_row + slice.begin);
      AttendResult& result = *portion.state->io->result;
      const size_t out_bytes = rows * row_floats(portion) * sizeof(float);
      const size_t lse_bytes = rows * row_lses(portion) * sizeof(float);
      std::memcpy(result.out.data() + first * row_floats(portion), data, out_bytes);
      if (portion.method().has_lse()) {
        std::memcpy(result.lse.data() + first * row_lses(portion), data + out_bytes, lse_bytes);
      }
      data += out_bytes + lse_bytes;
    }
  }
}

// Answers that other ranks merged go to the lead.
Status gather_answers(Rank& rank, Round& round, std::span<const Answer> answers) {
  const auto ranks = static_cast<size_t>(rank.size());
  std::vector<int64_t> send_sizes(ranks, 0);
  std::vector<int64_t> receive_sizes(ranks, 0);
  for (const Portion& portion : round) {
    send_sizes[0] += static_cast<int64_t>(answer_bytes(portion, rank.index, rank.size()));
    for (size_t peer = 0; peer < ranks && rank.is_lead(); ++peer) {
      receive_sizes[peer] +=
          static_cast<int64_t>(answer_bytes(portion, static_cast<int>(peer), rank.size()));
    }
  }
  int64_t total = 0;
  for (const int64_t size : receive_sizes) {
    total += size;
  }
  LONGSPAN_ASSIGN_OR_RETURN(
      std::span<std::byte> send,
      rank.arena.allocate_span<std::byte>(static_cast<size_t>(send_sizes[0])));
  LONGSPAN_ASSIGN_OR_RETURN(std::span<std::byte> received,
                            rank.arena.allocate_span<std::byte>(static_cast<size_t>(total)));
  std::byte* next = send.data();
  for (size_t i = 0; i < round.size() && !rank.is_lead(); ++i) {
    const auto rows = static_cast<size_t>(slice_of(round[i], rank.index, rank.size()).size());
    next = put(next, answers[i].out, rows * row_floats(round[i]) * sizeof(float));
    next = put(next, answers[i].lse, rows * row_lses(round[i]) * sizeof(float));
  }
  LONGSPAN_RETURN_IF_ERROR(
      rank.data.all_to_all(send, send_sizes, received, receive_sizes, Rank::exchange_deadline()));
  if (rank.is_lead()) {
    read_answers(rank, round, received.data());
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<const float*> sink_rows(Rank& rank, const Portion& portion, size_t count) {
  const ContextShape& shape = portion.shape();
  if (shape.sink_logits.empty()) {
    return nullptr;
  }
  const size_t heads = row_lses(portion);
  const bool by_layer = shape.sink_logits.size() > heads;
  const size_t first = by_layer ? static_cast<size_t>(portion.state->task->layer) * heads : 0;
  LONGSPAN_ASSIGN_OR_RETURN(float* rows, rank.arena.allocate<float>(count));
  for (size_t i = 0; i < count; ++i) {
    rows[i] = shape.sink_logits[first + i % heads];
  }
  return rows;
}

Status reduce_round(Rank& rank, Round& round, RankReport& own, GroupReport* reports) {
  own.used_bytes = rank.store.pool().used_bytes();
  std::vector<Partials> partials;
  if (rank.size() == 1) {
    partials.resize(round.size());
    for (size_t i = 0; i < round.size(); ++i) {
      const Portion& portion = round[i];
      partials[i].resize(portion.num_parts, 1);
      for (size_t part = 0; part < static_cast<size_t>(portion.num_parts); ++part) {
        partials[i].out[part] = portion.out + part * portion.out_size();
        partials[i].lse[part] = portion.lse + part * portion.row_heads();
      }
      portion.state->io->result->selected_tokens += portion.selected_tokens;
    }
    add_report(own, 0, *reports);
  } else {
    LONGSPAN_ASSIGN_OR_RETURN(partials, exchange_partials(rank, round, own, reports));
  }
  std::vector<Answer> answers(round.size());
  bool any_sliced = false;
  for (size_t i = 0; i < round.size(); ++i) {
    const Slice slice = slice_of(round[i], rank.index, rank.size());
    any_sliced = any_sliced || is_sliced(round[i], rank.size());
    if (slice.size() > 0) {
      LONGSPAN_ASSIGN_OR_RETURN(answers[i], place_of_answer(rank, round[i], slice));
      LONGSPAN_RETURN_IF_ERROR(Merger(rank, round[i], slice, partials[i]).merge(answers[i]));
    }
  }
  return any_sliced ? gather_answers(rank, round, answers) : absl::OkStatus();
}

Status exchange_reports(Rank& rank, RankReport& own, GroupReport* reports) {
  Round none;
  return reduce_round(rank, none, own, reports);
}

}  // namespace longspan
