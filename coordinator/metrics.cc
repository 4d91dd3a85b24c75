#include "coordinator/metrics.h"

namespace longspan {
namespace {

// 1 Ki to 16 Mi tokens in steps of 4.
prometheus::Histogram::BucketBoundaries token_buckets() {
  prometheus::Histogram::BucketBoundaries bounds;
  for (double tokens = 1024; tokens <= 16.0 * 1024 * 1024; tokens *= 4) {
    bounds.push_back(tokens);
  }
  return bounds;
}

}  // namespace

CoordinatorMetrics::CoordinatorMetrics(prometheus::Registry& registry)
    : tokens_(prometheus::BuildHistogram()
                  .Name("longspan_context_tokens")
                  .Help("Committed length of contexts when they were deleted or expired.")
                  .Register(registry)
                  .Add({}, token_buckets())) {
  auto& contexts = prometheus::BuildGauge()
                       .Name("longspan_contexts")
                       .Help("Contexts in the catalogue.")
                       .Register(registry);
  ready_ = &contexts.Add({{"state", "ready"}});
  pending_ = &contexts.Add({{"state", "pending"}});
}

void CoordinatorMetrics::set_contexts(size_t ready, size_t pending) {
  ready_->Set(static_cast<double>(ready));
  pending_->Set(static_cast<double>(pending));
}

void CoordinatorMetrics::ended(uint64_t num_tokens) {
  tokens_.Observe(static_cast<double>(num_tokens));
}

}  // namespace longspan
