// The data plane over gRPC: AttentionService and IntrospectService in front of a lead.
#pragma once

#include <chrono>
#include <memory>

#include "longspan/v1/attention.grpc.pb.h"
#include "longspan/v1/introspect.grpc.pb.h"

#include "base/request.h"
#include "base/stream_set.h"
#include "worker/lead.h"
#include "worker/metrics.h"
#include "worker/spec_codec.h"

namespace longspan {

// What every call works with; outlives them all.
struct ServiceEnvironment {
  Lead& lead;
  ServerTerms terms;
  RequestObserver& observer;
  WorkerMetrics& metrics;
  StreamSet& streams;
  // For calls that bring no deadline of their own.
  std::chrono::milliseconds decode_deadline{2'000};
  std::chrono::milliseconds prefill_deadline{60'000};
  std::chrono::milliseconds append_deadline{30'000};
  // How long a peer may leave an answer unread.
  std::chrono::milliseconds stall_timeout{30'000};
};

std::unique_ptr<v1::AttentionService::Service> make_attention_service(
    const ServiceEnvironment& environment);
std::unique_ptr<v1::IntrospectService::Service> make_introspect_service(
    const ServiceEnvironment& environment);

}  // namespace longspan
