// Append: a stream of keys and values that becomes visible at once, at its end, or not at all.
#pragma once

#include "grpcpp/grpcpp.h"

#include "worker/service.h"

namespace longspan {

// Deletes itself. `response` is filled before the call ends.
grpc::ServerReadReactor<grpc::ByteBuffer>* start_append_stream(
    const ServiceEnvironment& environment,
    grpc::CallbackServerContext* context,
    grpc::ByteBuffer* response);

}  // namespace longspan
