// The end of the pipeline: partial answers of all ranks become answers, at the lead.
#pragma once

#include "base/status.h"
#include "worker/portion.h"

namespace longspan {

// Exchanges and merges the partial answers of a round; with them goes each rank's report, which the
// lead keeps the maxima of (`reports` of the lead alone: used bytes by rank, slowest stages).
struct GroupReport {
  std::vector<int64_t> used_bytes;  // by rank
  RankReport slowest;
};
Status reduce_round(Rank& rank, Round& round, RankReport& own, GroupReport* reports);

// The reports alone, for steps without rows.
Status exchange_reports(Rank& rank, RankReport& own, GroupReport* reports);

// The sink logits of `count` rows times heads of a portion, for MergeParams; null without sinks.
StatusOr<const float*> sink_rows(Rank& rank, const Portion& portion, size_t count);

}  // namespace longspan
