// The control plane over gRPC: ContextService and ServerService in front of a coordinator.
#pragma once

#include <chrono>
#include <memory>

#include "longspan/v1/context.grpc.pb.h"
#include "longspan/v1/server.grpc.pb.h"

#include "base/request.h"
#include "base/stream_set.h"
#include "coordinator/coordinator.h"

namespace longspan {

// What every call works with; outlives them all.
struct ControlEnvironment {
  Coordinator& coordinator;
  RequestObserver& observer;
  StreamSet& streams;
  // How long a peer may leave an answer unread.
  std::chrono::milliseconds stall_timeout{30'000};
};

std::unique_ptr<v1::ContextService::Service> make_context_service(
    const ControlEnvironment& environment);
std::unique_ptr<v1::ServerService::Service> make_server_service(
    const ControlEnvironment& environment);

}  // namespace longspan
