// Prefill: chunks of queries of one context, each atomic, answered in order.
#pragma once

#include "grpcpp/grpcpp.h"

#include "worker/service.h"

namespace longspan {

// Deletes itself.
grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* start_prefill_stream(
    const ServiceEnvironment& environment, grpc::CallbackServerContext* context);

}  // namespace longspan
