#include "worker/metrics.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/metrics.h"

namespace longspan {
namespace {

// There are no tenants yet.
constexpr char kTenant[] = "default";
constexpr char kTransport[] = "in_process";
const std::string& other_policy() {
  static const std::string kOther = "other";
  return kOther;
}

prometheus::Histogram::BucketBoundaries recall_buckets() {
  return {.5, .8, .9, .95, .98, .99, .995, .999, 1};
}

template <class Builder>
auto& family(Builder&& builder,
             const char* name,
             const char* help,
             prometheus::Registry& registry) {
  return builder.Name(name).Help(help).Register(registry);
}

double seconds(std::chrono::nanoseconds duration) {
  return std::chrono::duration<double>(duration).count();
}

void raise_to(prometheus::Counter& counter, int64_t total) {
  const double more = static_cast<double>(total) - counter.Value();
  if (more > 0) {
    counter.Increment(more);
  }
}

}  // namespace

WorkerMetrics::WorkerMetrics(prometheus::Registry& registry, std::set<std::string> policies)
    : policies_(std::move(policies)),
      selected_(family(prometheus::BuildCounter(),
                       "longspan_selected_tokens_total",
                       "Keys attended to, over rows and query heads.",
                       registry)),
      candidates_(family(prometheus::BuildCounter(),
                         "longspan_candidate_tokens_total",
                         "Keys visible to the same rows and heads.",
                         registry)),
      recall_(
          family(prometheus::BuildHistogram(),
                 "longspan_selection_recall_ratio",
                 "Share of dense attention mass on the selected tokens, where Explain compared.",
                 registry)),
      queue_depth_(family(prometheus::BuildGauge(),
                          "longspan_queue_depth",
                          "Jobs that wait for the engine.",
                          registry)),
      kv_bytes_(family(
          prometheus::BuildGauge(), "longspan_kv_bytes", "Bytes of pages in use.", registry)),
      kv_capacity_(family(prometheus::BuildGauge(),
                          "longspan_kv_capacity_bytes",
                          "Bytes of pages at most.",
                          registry)),
      appended_tokens_(family(prometheus::BuildCounter(),
                              "longspan_appended_tokens_total",
                              "Tokens stored, each layer's counted.",
                              registry)
                           .Add({{"tenant", kTenant}})),
      query_tokens_(family(prometheus::BuildCounter(),
                           "longspan_query_tokens_total",
                           "Query rows answered.",
                           registry)
                        .Add({{"tenant", kTenant}})),
      skew_(family(prometheus::BuildGauge(),
                   "longspan_shard_skew_ratio",
                   "Bytes of the fullest rank over the mean.",
                   registry)
                .Add({})) {
  auto& stages = family(prometheus::BuildHistogram(),
                        "longspan_stage_duration_seconds",
                        "Time in each stage of a step, the slowest rank's.",
                        registry);
  const auto stage = [&stages](const char* name) {
    return &stages.Add({{"stage", name}}, latency_buckets());
  };
  stage_queue_ = stage("queue");
  stage_scatter_ = stage("scatter");
  stage_select_ = stage("select");
  stage_compute_ = stage("compute");
  stage_reduce_ = stage("reduce");
  stage_send_ = stage("send");
  auto& steps =
      family(prometheus::BuildCounter(), "longspan_steps_total", "Steps of the group.", registry);
  steps_decode_ = &steps.Add({{"phase", "decode"}});
  steps_prefill_ = &steps.Add({{"phase", "prefill"}});
  auto& bytes = family(prometheus::BuildCounter(),
                       "longspan_comm_bytes_total",
                       "Bytes between the ranks, over all of them.",
                       registry);
  bytes_sent_ = &bytes.Add({{"transport", kTransport}, {"direction", "sent"}});
  bytes_received_ = &bytes.Add({{"transport", kTransport}, {"direction", "received"}});
}

void WorkerMetrics::queued(std::chrono::nanoseconds waited) {
  stage_queue_->Observe(seconds(waited));
}

void WorkerMetrics::step(Phase phase, const StageTimes& times) {
  (phase == Phase::kDecode ? steps_decode_ : steps_prefill_)->Increment();
  stage_scatter_->Observe(times.scatter);
  stage_select_->Observe(times.select);
  stage_compute_->Observe(times.compute);
  stage_reduce_->Observe(times.reduce);
}

void WorkerMetrics::sent(std::chrono::nanoseconds duration) {
  stage_send_->Observe(seconds(duration));
}

const std::string& WorkerMetrics::policy(const AttendItem& item) const {
  const auto found = policies_.find(item.method->name);
  return found == policies_.end() ? other_policy() : *found;
}

void WorkerMetrics::attended(const AttendItem& item, const AttendResult& result) {
  const std::string& name = policy(item);
  query_tokens_.Increment(static_cast<double>(item.num_rows));
  selected_.Add({{"policy", name}}).Increment(static_cast<double>(result.selected_tokens));
  candidates_.Add({{"policy", name}}).Increment(static_cast<double>(result.visible_tokens));
  for (const float recall : result.recall) {
    recall_.Add({{"policy", name}}, recall_buckets()).Observe(recall);
  }
}

void WorkerMetrics::appended(int64_t num_tokens) {
  if (num_tokens > 0) {
    appended_tokens_.Increment(static_cast<double>(num_tokens));
  }
}

void WorkerMetrics::set_usage(const GroupUsage& usage) {
  const auto ranks = static_cast<double>(usage.rank_bytes.size());
  for (size_t rank = 0; rank < usage.rank_bytes.size(); ++rank) {
    const prometheus::Labels labels{{"worker", absl::StrCat(rank)}, {"tier", "host"}};
    kv_bytes_.Add(labels).Set(static_cast<double>(usage.rank_bytes[rank]));
    kv_capacity_.Add(labels).Set(static_cast<double>(usage.capacity_bytes) / ranks);
  }
  const auto total = static_cast<double>(
      std::accumulate(usage.rank_bytes.begin(), usage.rank_bytes.end(), int64_t{0}));
  const auto fullest = usage.rank_bytes.empty()
                           ? 0.0
                           : static_cast<double>(*std::max_element(usage.rank_bytes.begin(),
                                                                   usage.rank_bytes.end()));
  skew_.Set(total > 0 ? fullest * ranks / total : 1.0);
  raise_to(*bytes_sent_, usage.bytes_sent);
  raise_to(*bytes_received_, usage.bytes_received);
}

void WorkerMetrics::set_queue_depth(const std::string& kind, int depth) {
  queue_depth_.Add({{"op", kind}}).Set(depth);
}

}  // namespace longspan
