#include "worker/service.h"

#include <utility>
#include <vector>

#include "base/rpc.h"
#include "worker/append_stream.h"
#include "worker/call_codec.h"
#include "worker/decode_batch.h"
#include "worker/decode_stream.h"
#include "worker/prefill_stream.h"

namespace longspan {
namespace {

// Calls arrive as bytes: see base/rpc.h.
using RawAttentionService = v1::AttentionService::WithRawCallbackMethod_Append<
    v1::AttentionService::WithRawCallbackMethod_Prefill<
        v1::AttentionService::WithRawCallbackMethod_Decode<
            v1::AttentionService::WithRawCallbackMethod_DecodeStream<
                v1::AttentionService::Service>>>>;
using RawIntrospectService =
    v1::IntrospectService::WithRawCallbackMethod_Explain<v1::IntrospectService::Service>;

class AttentionService final : public RawAttentionService {
 public:
  explicit AttentionService(const ServiceEnvironment& environment) : environment_(environment) {}

  grpc::ServerReadReactor<grpc::ByteBuffer>* Append(grpc::CallbackServerContext* context,
                                                    grpc::ByteBuffer* response) override {
    return start_append_stream(environment_, context, response);
  }

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Prefill(
      grpc::CallbackServerContext* context) override {
    return start_prefill_stream(environment_, context);
  }

  grpc::ServerUnaryReactor* Decode(grpc::CallbackServerContext* context,
                                   const grpc::ByteBuffer* request,
                                   grpc::ByteBuffer* response) override {
    using Call = UnaryCall<v1::DecodeRequest, v1::DecodeResponse>;
    return take_unary<v1::DecodeRequest, v1::DecodeResponse>(
        context, request, response, environment_.observer, "Decode", [this](Call& call) {
          if (call.request().items_size() == 1) {
            call.set_context_id(call.request().items(0).context_id());
          }
          run_decode_batch(environment_,
                           call.request().items(),
                           *call.response().mutable_results(),
                           nullptr,
                           {.deadline = call.deadline(environment_.decode_deadline),
                            .cancelled = &call.cancelled()},
                           [&call, this](const Status& status) {
                             const auto begin = std::chrono::steady_clock::now();
                             call.finish(status);
                             environment_.metrics.sent(std::chrono::steady_clock::now() - begin);
                           });
        });
  }

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* DecodeStream(
      grpc::CallbackServerContext* context) override {
    return start_decode_stream(environment_, context);
  }

 private:
  const ServiceEnvironment& environment_;
};

class IntrospectService final : public RawIntrospectService {
 public:
  explicit IntrospectService(const ServiceEnvironment& environment) : environment_(environment) {}

  grpc::ServerUnaryReactor* Explain(grpc::CallbackServerContext* context,
                                    const grpc::ByteBuffer* request,
                                    grpc::ByteBuffer* response) override {
    return take_unary<v1::ExplainRequest, v1::ExplainResponse>(
        context, request, response, environment_.observer, "Explain", [this](Call& call) {
          call.set_context_id(call.request().context_id());
          if (const Status status = start(call); !status.ok()) {
            call.finish(status);
          }
        });
  }

 private:
  using Call = UnaryCall<v1::ExplainRequest, v1::ExplainResponse>;

  // With OK the call is finished by the lead's answer.
  Status start(Call& explain) {
    LONGSPAN_ASSIGN_OR_RETURN(const ContextRef context,
                              environment_.lead.find(explain.request().context_id()));
    LONGSPAN_ASSIGN_OR_RETURN(DecodedItem decoded,
                              decode_explain(explain.request(), *context, environment_.terms));
    auto item = std::make_shared<DecodedItem>(std::move(decoded));
    Lead::AttendCall call;
    call.context = context;
    call.item = item->item;
    call.num_bytes = item->num_bytes;
    call.terms = {.deadline = explain.deadline(environment_.prefill_deadline),
                  .cancelled = &explain.cancelled()};
    call.done = [&explain, item, this](const AttendResult& result, uint64_t) {
      explain.finish(result.status.ok() ? answer(explain, *item, result) : result.status);
    };
    std::vector<Lead::AttendCall> calls;
    calls.push_back(std::move(call));
    return environment_.lead.attend(std::move(calls));
  }

  Status answer(Call& explain, const DecodedItem& item, const AttendResult& result) const {
    v1::ExplainResponse& message = explain.response();
    for (const RowSelection& selection : result.selections) {
      encode_selection(selection, *message.add_selections());
    }
    message.mutable_recall()->Add(result.recall.begin(), result.recall.end());
    message.mutable_relative_error()->Add(result.relative_error.begin(),
                                          result.relative_error.end());
    message.set_read_fraction(result.visible_tokens > 0
                                  ? static_cast<double>(result.selected_tokens) /
                                        static_cast<double>(result.visible_tokens)
                                  : 0.0);
    message.set_method_name(item.item.method->name);
    if (message.ByteSizeLong() > environment_.terms.limits.max_message_bytes()) {
      return with_reason(absl::ResourceExhaustedError(
                             "the selections are larger than a message: ask for fewer rows"),
                         "ANSWER_TOO_LARGE");
    }
    return absl::OkStatus();
  }

  const ServiceEnvironment& environment_;
};

}  // namespace

std::unique_ptr<v1::AttentionService::Service> make_attention_service(
    const ServiceEnvironment& environment) {
  return std::make_unique<AttentionService>(environment);
}

std::unique_ptr<v1::IntrospectService::Service> make_introspect_service(
    const ServiceEnvironment& environment) {
  return std::make_unique<IntrospectService>(environment);
}

}  // namespace longspan
