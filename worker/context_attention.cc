#include "worker/context_attention.h"

#include <algorithm>
#include <cstring>

#include "worker/attend.h"
#include "worker/compare.h"
#include "worker/portion.h"
#include "worker/select.h"
#include "worker/token_transfer.h"

namespace longspan {
namespace {

// What the lead broadcasts at the start of a round: whether it takes place, small keys and values
// of the whole step (first round only), and the queries of its portions.
struct RoundHeader {
  int64_t goes_on = 1;
};

// Small enough to be no cost, and keeps the floats behind it aligned.
constexpr size_t kHeaderBytes = kBufferAlignment;

size_t aligned(size_t bytes) {
  return (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
}

struct RoundInputs {
  bool goes_on = true;
  const std::byte* tokens = nullptr;  // as TokenTransfer packed them
};

// Hands every portion its queries; `transfer` in the first round.
StatusOr<RoundInputs> receive_inputs(Rank& rank,
                                     Round& round,
                                     const TokenTransfer* transfer,
                                     Deadline deadline) {
  const size_t token_bytes = transfer == nullptr ? 0 : aligned(transfer->broadcast_bytes());
  size_t total = kHeaderBytes + token_bytes;
  for (const Portion& portion : round) {
    total += aligned(input_floats(portion) * sizeof(float));
  }
  LONGSPAN_ASSIGN_OR_RETURN(std::span<std::byte> data, rank.arena.allocate_span<std::byte>(total));
  if (rank.is_lead()) {
    RoundHeader header;
    header.goes_on = transfer != nullptr || std::chrono::steady_clock::now() < deadline ? 1 : 0;
    std::memset(data.data(), 0, kHeaderBytes);
    std::memcpy(data.data(), &header, sizeof header);
    if (token_bytes > 0) {
      transfer->pack_broadcast(data.data() + kHeaderBytes);
    }
    std::byte* next = data.data() + kHeaderBytes + token_bytes;
    for (const Portion& portion : round) {
      pack_inputs(portion, reinterpret_cast<float*>(next));
      next += aligned(input_floats(portion) * sizeof(float));
    }
  }
  // A lone rank broadcasts too: so it meets a stopped group between rounds.
  LONGSPAN_RETURN_IF_ERROR(rank.data.broadcast(data, 0, Rank::exchange_deadline()));
  RoundHeader header;
  std::memcpy(&header, data.data(), sizeof header);
  const std::byte* next = data.data() + kHeaderBytes + token_bytes;
  for (Portion& portion : round) {
    set_inputs(portion, reinterpret_cast<const float*>(next));
    next += aligned(input_floats(portion) * sizeof(float));
  }
  return RoundInputs{header.goes_on != 0, data.data() + kHeaderBytes};
}

void keep_running(Round& round) {
  std::erase_if(round, [](const Portion& portion) { return !portion.state->is_running(); });
}

Status run_round(Rank& rank, Round& round, RankReport& report, GroupReport* reports) {
  {
    const StageTimer timer(report.select_seconds);
    LONGSPAN_RETURN_IF_ERROR(prepare_portions(rank, round));
    LONGSPAN_RETURN_IF_ERROR(attend_to_summaries(rank, round));
    LONGSPAN_RETURN_IF_ERROR(search_candidates(rank, round));
  }
  {
    const StageTimer timer(report.compute_seconds);
    LONGSPAN_RETURN_IF_ERROR(attend_to_tokens(rank, round));
  }
  const StageTimer timer(report.reduce_seconds);
  LONGSPAN_RETURN_IF_ERROR(reduce_round(rank, round, report, reports));
  report_selections(rank, round);
  return compare_with_dense(rank, round);
}

// Tasks with rows in this or a later round had no effect: their rows go.
void abandon(Rank& rank, std::span<Round> rounds) {
  for (const Round& round : rounds) {
    for (const Portion& portion : round) {
      TaskState& state = *portion.state;
      if (!state.is_running()) {
        continue;
      }
      state.abandoned = true;
      if (state.task->has_tokens) {
        rank.store.truncate_layer(*state.shard, state.task->layer, state.visible_before);
      }
    }
  }
}

}  // namespace

Status store_tokens(Rank& rank, std::span<TaskState> tasks) {
  TokenTransfer transfer(rank, tasks);
  LONGSPAN_ASSIGN_OR_RETURN(
      std::span<std::byte> data,
      rank.arena.allocate_span<std::byte>(aligned(transfer.broadcast_bytes())));
  if (!data.empty()) {
    if (rank.is_lead()) {
      transfer.pack_broadcast(data.data());
    }
    LONGSPAN_RETURN_IF_ERROR(rank.data.broadcast(data, 0, Rank::exchange_deadline()));
  }
  LONGSPAN_RETURN_IF_ERROR(transfer.receive(data.data()));
  return transfer.store();
}

Status attend_tasks(Rank& rank,
                    std::span<TaskState> tasks,
                    Deadline deadline,
                    RankReport& report,
                    GroupReport* reports) {
  TokenTransfer transfer(rank, tasks);
  std::vector<Round> rounds = plan_rounds(tasks, rank.size());
  bool is_reported = false;  // what the lead knows of this rank is up to date
  for (size_t i = 0; i < rounds.size(); ++i) {
    Round& round = rounds[i];
    const bool is_first = i == 0;
    {
      const StageTimer timer(report.scatter_seconds);
      rank.arena.reset();
      keep_running(round);
      if (round.empty()) {
        continue;
      }
      LONGSPAN_ASSIGN_OR_RETURN(
          const RoundInputs inputs,
          receive_inputs(rank, round, is_first ? &transfer : nullptr, deadline));
      if (!inputs.goes_on) {
        abandon(rank, std::span(rounds).subspan(i));
        is_reported = false;
        break;
      }
      if (is_first) {
        LONGSPAN_RETURN_IF_ERROR(transfer.receive(inputs.tokens));
        LONGSPAN_RETURN_IF_ERROR(transfer.store());
        keep_running(round);
      }
    }
    LONGSPAN_RETURN_IF_ERROR(run_round(rank, round, report, reports));
    is_reported = true;
  }
  return is_reported ? absl::OkStatus() : exchange_reports(rank, report, reports);
}

}  // namespace longspan
