// DecodeStream: a session of steps over contexts that are named once.
#pragma once

#include "grpcpp/grpcpp.h"

#include "worker/service.h"

namespace longspan {

// Deletes itself.
grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* start_decode_stream(
    const ServiceEnvironment& environment, grpc::CallbackServerContext* context);

}  // namespace longspan
