// Metrics of requests, and of the process. Names, labels and buckets are a contract with dashboards
// and alerts (docs/operations.md).
#pragma once

#include <map>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "prometheus/collectable.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

#include "base/request.h"

namespace longspan {

// 25 us to 10 s in steps of 1, 2.5, 5.
prometheus::Histogram::BucketBoundaries latency_buckets();

// The name of a code as gRPC spells it: "INVALID_ARGUMENT".
std::string code_name(absl::StatusCode code);

// Counts every request. Thread-safe.
class RequestMetrics {
 public:
  explicit RequestMetrics(prometheus::Registry& registry);

  void started(absl::string_view operation);
  void finished(const RequestRecord& record);

 private:
  // What one operation needs, looked up once.
  struct Operation {
    prometheus::Histogram* duration = nullptr;
    prometheus::Gauge* inflight = nullptr;
    std::map<absl::StatusCode, prometheus::Counter*> by_code;
  };
  Operation& operation(absl::string_view name);

  prometheus::Family<prometheus::Counter>& requests_;
  prometheus::Family<prometheus::Histogram>& durations_;
  prometheus::Family<prometheus::Gauge>& inflight_;
  prometheus::Family<prometheus::Counter>& rejected_;
  std::mutex mutex_;  // guards operations_
  std::map<std::string, Operation, std::less<>> operations_;
};

// process_* and longspan_build_info, read when scraped.
class ProcessMetrics final : public prometheus::Collectable {
 public:
  explicit ProcessMetrics(std::string version);
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  std::string version_;
  double start_time_seconds_;
};

}  // namespace longspan
