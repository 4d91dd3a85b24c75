// Metrics of a worker: stages, queue, memory, selection, communication.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

#include "worker/group.h"

namespace longspan {

// Thread-safe.
class WorkerMetrics {
 public:
  // Methods of these names have a label of their own; others count as "other", so that callers
  // cannot add labels without bound.
  WorkerMetrics(prometheus::Registry& registry, std::set<std::string> policies);

  void queued(std::chrono::nanoseconds waited);
  void step(Phase phase, const StageTimes& times);
  void sent(std::chrono::nanoseconds duration);
  void attended(const AttendItem& item, const AttendResult& result);
  void appended(int64_t num_tokens);
  void set_usage(const GroupUsage& usage);
  void set_queue_depth(const std::string& kind, int depth);

 private:
  const std::string& policy(const AttendItem& item) const;

  std::set<std::string> policies_;
  prometheus::Family<prometheus::Counter>& selected_;
  prometheus::Family<prometheus::Counter>& candidates_;
  prometheus::Family<prometheus::Histogram>& recall_;
  prometheus::Family<prometheus::Gauge>& queue_depth_;
  prometheus::Family<prometheus::Gauge>& kv_bytes_;
  prometheus::Family<prometheus::Gauge>& kv_capacity_;
  prometheus::Histogram* stage_queue_;
  prometheus::Histogram* stage_scatter_;
  prometheus::Histogram* stage_select_;
  prometheus::Histogram* stage_compute_;
  prometheus::Histogram* stage_reduce_;
  prometheus::Histogram* stage_send_;
  prometheus::Counter& appended_tokens_;
  prometheus::Counter& query_tokens_;
  prometheus::Counter* steps_decode_;
  prometheus::Counter* steps_prefill_;
  prometheus::Gauge& skew_;
  prometheus::Counter* bytes_sent_;
  prometheus::Counter* bytes_received_;
};

}  // namespace longspan
