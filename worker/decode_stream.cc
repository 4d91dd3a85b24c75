#include "worker/decode_stream.h"

#include <algorithm>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"

#include "base/error_details.h"
#include "base/ordered_stream.h"
#include "worker/decode_batch.h"

namespace longspan {
namespace {

constexpr char kStepOperation[] = "DecodeStep";

class DecodeStream final : public OrderedStream<v1::DecodeStreamRequest, v1::DecodeStreamResponse> {
 public:
  DecodeStream(const ServiceEnvironment& environment, grpc::CallbackServerContext* context)
      : OrderedStream(context,
                      environment.observer,
                      environment.streams,
                      "DecodeStream",
                      environment.stall_timeout),
        environment_(environment) {
    start();
  }

 private:
  Status handle(Slot& slot) override {
    if (!opened_) {
      LONGSPAN_RETURN_IF_ERROR(open(slot));
      opened_ = true;
      complete(slot);
      return absl::OkStatus();
    }
    if (!slot.request.has_step()) {
      return invalid_argument("step", "must follow: a stream is opened once");
    }
    if (slot.request.step().seq() <= last_seq_ && has_steps_) {
      return invalid_argument("step.seq", absl::StrCat("must be above ", last_seq_));
    }
    has_steps_ = true;
    last_seq_ = slot.request.step().seq();
    run(slot);
    return absl::OkStatus();
  }

  Status open(Slot& slot) {
    if (!slot.request.has_open()) {
      return invalid_argument("open", "must come first");
    }
    const v1::DecodeStreamRequest::Open& message = slot.request.open();
    const v1::Limits& limits = environment_.terms.limits;
    if (message.context_ids().empty() ||
        static_cast<uint32_t>(message.context_ids_size()) > limits.max_stream_contexts()) {
      return invalid_argument("open.context_ids",
                              absl::StrCat("must be 1 to ", limits.max_stream_contexts()));
    }
    for (const std::string& id : message.context_ids()) {
      LONGSPAN_RETURN_IF_ERROR(environment_.lead.find(id).status());
      contexts_.insert(id);
    }
    const uint32_t window = message.window() == 0
                                ? limits.max_stream_window()
                                : std::min(message.window(), limits.max_stream_window());
    set_window(window);
    slot.response.mutable_opened()->set_window(window);
    return absl::OkStatus();
  }

  void run(Slot& slot) {
    const v1::DecodeStreamRequest::Step& step = slot.request.step();
    v1::DecodeStreamResponse::StepResult& result = *slot.response.mutable_result();
    result.set_seq(step.seq());
    observer().started(kStepOperation);
    const CallTerms terms{.deadline = std::min(deadline_of(context(), environment_.decode_deadline),
                                               slot.arrival + environment_.decode_deadline),
                          .cancelled = &cancelled()};
    run_decode_batch(environment_,
                     step.items(),
                     *result.mutable_results(),
                     &contexts_,
                     terms,
                     [this, &slot, &result](const Status& status) {
                       if (!status.ok()) {
                         result.clear_results();
                         *result.mutable_status() = to_rpc_status(status);
                       }
                       report(slot, status);
                       const auto begin = std::chrono::steady_clock::now();
                       WorkerMetrics& metrics = environment_.metrics;
                       complete(slot);  // the stream may be gone after this
                       metrics.sent(std::chrono::steady_clock::now() - begin);
                     });
  }

  void report(const Slot& slot, const Status& status) {
    RequestRecord record;
    record.operation = kStepOperation;
    record.status = status;
    record.duration = std::chrono::steady_clock::now() - slot.arrival;
    record.part_of_stream = true;
    observer().finished(record);
  }

  const ServiceEnvironment& environment_;
  // Of the thread that handles messages.
  bool opened_ = false;
  bool has_steps_ = false;
  uint64_t last_seq_ = 0;
  std::set<std::string> contexts_;
};

}  // namespace

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* start_decode_stream(
    const ServiceEnvironment& environment, grpc::CallbackServerContext* context) {
  return new DecodeStream(environment, context);
}

}  // namespace longspan
