// What both services share in answering calls: parsing, deadlines, identity, and a unary call.
//
// Calls are taken as bytes (the raw callback interface) and parsed here: a message that does not
// parse is INVALID_ARGUMENT, where gRPC's own handlers would answer UNIMPLEMENTED, or take a
// garbled message of a stream for its end.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <utility>

#include "google/protobuf/arena.h"
#include "google/protobuf/message.h"
#include "grpcpp/grpcpp.h"

#include "base/error_details.h"
#include "base/request.h"
#include "base/status.h"

namespace longspan {

using SteadyTime = std::chrono::steady_clock::time_point;

// INVALID_ARGUMENT, reason MALFORMED, when the bytes are no message of this type.
Status parse_message(const grpc::ByteBuffer& bytes, google::protobuf::Message& message);
grpc::ByteBuffer serialize_message(const google::protobuf::Message& message);

// The caller's deadline; `fallback` from now when it gave none.
SteadyTime deadline_of(const grpc::ServerContextBase& context, std::chrono::milliseconds fallback);
RequestIdentity identity_of(const grpc::ServerContextBase& context);
// Tells retrying clients to wait for as long as the status' RetryInfo says.
void add_retry_pushback(grpc::ServerContextBase& context, const Status& status);

// UNAVAILABLE, reason DRAINING.
Status draining_error();

// One unary call, from parsed bytes to the reported end. Deletes itself; `finish` is called exactly
// once, from any thread, and the call must not be touched afterwards.
template <class Request, class Response>
class UnaryCall final : public grpc::ServerUnaryReactor {
 public:
  UnaryCall(grpc::CallbackServerContext* context,
            grpc::ByteBuffer* response_bytes,
            RequestObserver& observer,
            absl::string_view operation)
      : context_(context),
        response_bytes_(response_bytes),
        observer_(observer),
        request_(google::protobuf::Arena::CreateMessage<Request>(&arena_)),
        response_(google::protobuf::Arena::CreateMessage<Response>(&arena_)),
        started_(std::chrono::steady_clock::now()) {
    record_.operation = operation;
    observer_.started(operation);
  }

  Request& request() { return *request_; }
  Response& response() { return *response_; }
  const std::atomic<bool>& cancelled() const { return cancelled_; }
  void set_context_id(const std::string& context_id) { record_.context_id = context_id; }
  SteadyTime deadline(std::chrono::milliseconds fallback) const {
    return deadline_of(*context_, fallback);
  }

  void finish(const Status& status) {
    if (status.ok()) {
      *response_bytes_ = serialize_message(*response_);
    } else {
      add_retry_pushback(*context_, status);
    }
    record_.status = status;
    record_.identity = identity_of(*context_);
    record_.duration = std::chrono::steady_clock::now() - started_;
    observer_.finished(record_);
    Finish(to_grpc_status(status));
  }

 private:
  void OnCancel() override { cancelled_.store(true, std::memory_order_relaxed); }
  void OnDone() override { delete this; }

  grpc::CallbackServerContext* context_;
  grpc::ByteBuffer* response_bytes_;
  RequestObserver& observer_;
  google::protobuf::Arena arena_;
  Request* request_;
  Response* response_;
  std::chrono::steady_clock::time_point started_;
  RequestRecord record_;
  std::atomic<bool> cancelled_ = false;
};

// Takes a call, parses its request and hands it to `handle(call)`, which finishes it.
template <class Request, class Response, class Handle>
grpc::ServerUnaryReactor* take_unary(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response,
                                     RequestObserver& observer,
                                     absl::string_view operation,
                                     const Handle& handle) {
  auto* call = new UnaryCall<Request, Response>(context, response, observer, operation);
  if (const Status status = parse_message(*request, call->request()); !status.ok()) {
    call->finish(status);
  } else {
    handle(*call);
  }
  return call;
}

}  // namespace longspan
