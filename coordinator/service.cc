#include "coordinator/service.h"

#include <utility>

#include "base/ordered_stream.h"
#include "base/rpc.h"

namespace longspan {
namespace {

// Calls arrive as bytes: see base/rpc.h.
template <class Base>
using RawCreateToList = v1::ContextService::WithRawCallbackMethod_CreateContext<
    v1::ContextService::WithRawCallbackMethod_GetContext<
        v1::ContextService::WithRawCallbackMethod_ListContexts<Base>>>;
template <class Base>
using RawDeleteToKeepAlive = v1::ContextService::WithRawCallbackMethod_DeleteContext<
    v1::ContextService::WithRawCallbackMethod_ForkContext<
        v1::ContextService::WithRawCallbackMethod_TruncateContext<
            v1::ContextService::WithRawCallbackMethod_KeepAlive<Base>>>>;
using RawContextService = RawCreateToList<RawDeleteToKeepAlive<v1::ContextService::Service>>;
using RawServerService = v1::ServerService::WithRawCallbackMethod_GetCapabilities<
    v1::ServerService::WithRawCallbackMethod_CheckSpec<v1::ServerService::Service>>;

class KeepAliveStream final : public OrderedStream<v1::KeepAliveRequest, v1::KeepAliveResponse> {
 public:
  KeepAliveStream(const ControlEnvironment& environment, grpc::CallbackServerContext* context)
      : OrderedStream(context,
                      environment.observer,
                      environment.streams,
                      "KeepAlive",
                      environment.stall_timeout),
        coordinator_(environment.coordinator) {
    start();
  }

 private:
  Status handle(Slot& slot) override {
    slot.response = coordinator_.keep_alive(slot.request);
    complete(slot);
    return absl::OkStatus();
  }

  Coordinator& coordinator_;
};

class ContextService final : public RawContextService {
 public:
  explicit ContextService(const ControlEnvironment& environment) : environment_(environment) {}

  grpc::ServerUnaryReactor* CreateContext(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override {
    return take<v1::CreateContextRequest, v1::CreateContextResponse>(
        context, request, response, "CreateContext", [this](auto& call) {
          call.set_context_id(call.request().context_id());
          environment_.coordinator.create(call.request(), answer_context(call));
        });
  }

  grpc::ServerUnaryReactor* GetContext(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override {
    return take<v1::GetContextRequest, v1::GetContextResponse>(
        context, request, response, "GetContext", [this](auto& call) {
          call.set_context_id(call.request().context_id());
          environment_.coordinator.get(call.request().context_id(), answer_context(call));
        });
  }

  grpc::ServerUnaryReactor* ListContexts(grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response) override {
    return take<v1::ListContextsRequest, v1::ListContextsResponse>(
        context, request, response, "ListContexts", [this](auto& call) {
          environment_.coordinator.list(call.request(),
                                        [&call](StatusOr<v1::ListContextsResponse> listed) {
                                          const Status status = listed.status();
                                          if (status.ok()) {
                                            call.response() = *std::move(listed);
                                          }
                                          call.finish(status);
                                        });
        });
  }

  grpc::ServerUnaryReactor* DeleteContext(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override {
    return take<v1::DeleteContextRequest, v1::DeleteContextResponse>(
        context, request, response, "DeleteContext", [this](auto& call) {
          call.set_context_id(call.request().context_id());
          environment_.coordinator.remove(call.request(),
                                          [&call](const Status& status) { call.finish(status); });
        });
  }

  grpc::ServerUnaryReactor* ForkContext(grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override {
    return take<v1::ForkContextRequest, v1::ForkContextResponse>(
        context, request, response, "ForkContext", [this](auto& call) {
          call.set_context_id(call.request().context_id());
          environment_.coordinator.fork(call.request(), answer_context(call));
        });
  }

  grpc::ServerUnaryReactor* TruncateContext(grpc::CallbackServerContext* context,
                                            const grpc::ByteBuffer* request,
                                            grpc::ByteBuffer* response) override {
    return take<v1::TruncateContextRequest, v1::TruncateContextResponse>(
        context, request, response, "TruncateContext", [this](auto& call) {
          call.set_context_id(call.request().context_id());
          environment_.coordinator.truncate(call.request(), answer_context(call));
        });
  }

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* KeepAlive(
      grpc::CallbackServerContext* context) override {
    return new KeepAliveStream(environment_, context);
  }

 private:
  template <class Request, class Response, class Handle>
  grpc::ServerUnaryReactor* take(grpc::CallbackServerContext* context,
                                 const grpc::ByteBuffer* request,
                                 grpc::ByteBuffer* response,
                                 absl::string_view operation,
                                 const Handle& handle) {
    return take_unary<Request, Response>(
        context, request, response, environment_.observer, operation, handle);
  }

  // Finishes a call whose response is a context.
  template <class Call>
  static Coordinator::ContextDone answer_context(Call& call) {
    return [&call](StatusOr<v1::Context> context) {
      const Status status = context.status();
      if (status.ok()) {
        call.set_context_id(context->context_id());
        *call.response().mutable_context() = *std::move(context);
      }
      call.finish(status);
    };
  }

  const ControlEnvironment& environment_;
};

class ServerService final : public RawServerService {
 public:
  explicit ServerService(const ControlEnvironment& environment) : environment_(environment) {}

  grpc::ServerUnaryReactor* GetCapabilities(grpc::CallbackServerContext* context,
                                            const grpc::ByteBuffer* request,
                                            grpc::ByteBuffer* response) override {
    return take_unary<v1::GetCapabilitiesRequest, v1::GetCapabilitiesResponse>(
        context, request, response, environment_.observer, "GetCapabilities", [this](auto& call) {
          call.response() = environment_.coordinator.worker().capabilities();
          call.finish(absl::OkStatus());
        });
  }

  grpc::ServerUnaryReactor* CheckSpec(grpc::CallbackServerContext* context,
                                      const grpc::ByteBuffer* request,
                                      grpc::ByteBuffer* response) override {
    return take_unary<v1::CheckSpecRequest, v1::CheckSpecResponse>(
        context, request, response, environment_.observer, "CheckSpec", [this](auto& call) {
          call.response() = environment_.coordinator.worker().check_spec(call.request().spec());
          call.finish(absl::OkStatus());
        });
  }

 private:
  const ControlEnvironment& environment_;
};

}  // namespace

std::unique_ptr<v1::ContextService::Service> make_context_service(
    const ControlEnvironment& environment) {
  return std::make_unique<ContextService>(environment);
}

std::unique_ptr<v1::ServerService::Service> make_server_service(
    const ControlEnvironment& environment) {
  return std::make_unique<ServerService>(environment);
}

}  // namespace longspan
