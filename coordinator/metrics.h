// Metrics of the coordinator.
#pragma once

#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace longspan {

// Thread-safe.
class CoordinatorMetrics {
 public:
  explicit CoordinatorMetrics(prometheus::Registry& registry);

  void set_contexts(size_t ready, size_t pending);
  void ended(uint64_t num_tokens);

 private:
  prometheus::Gauge* ready_;
  prometheus::Gauge* pending_;
  prometheus::Histogram& tokens_;
};

}  // namespace longspan
