#include "worker/prefill_stream.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "base/error_details.h"
#include "base/ordered_stream.h"
#include "worker/call_codec.h"

namespace longspan {
namespace {

constexpr char kChunkOperation[] = "PrefillChunk";
// One that runs, one that waits, and one each on the way in and out.
constexpr size_t kWindow = 4;

class PrefillStream final : public OrderedStream<v1::PrefillRequest, v1::PrefillResponse> {
 public:
  PrefillStream(const ServiceEnvironment& environment, grpc::CallbackServerContext* context)
      : OrderedStream(context,
                      environment.observer,
                      environment.streams,
                      "Prefill",
                      environment.stall_timeout),
        environment_(environment) {
    set_window(kWindow);
    start();
  }

 private:
  Status handle(Slot& slot) override {
    if (target_ == nullptr) {
      if (!slot.request.has_header()) {
        return invalid_argument("header", "must come first");
      }
      LONGSPAN_ASSIGN_OR_RETURN(target_,
                                environment_.lead.find(slot.request.header().context_id()));
      set_context_id(target_->id());
      options_.Swap(slot.request.mutable_header()->mutable_options());
      slot.has_response = false;
      complete(slot);
      return absl::OkStatus();
    }
    if (!slot.request.has_chunk()) {
      return invalid_argument("chunk", "must follow: there is one header");
    }
    run(slot);
    return absl::OkStatus();
  }

  void run(Slot& slot) {
    slot.response.set_seq(slot.request.chunk().seq());
    observer().started(kChunkOperation);
    StatusOr<DecodedItem> decoded =
        decode_chunk(slot.request.chunk(), options_, *target_, environment_.terms);
    if (!decoded.ok()) {
      fail(slot, decoded.status());
      return;
    }
    auto item = std::make_shared<DecodedItem>(*std::move(decoded));
    Lead::AttendCall call;
    call.context = target_;
    call.item = item->item;
    call.num_bytes = item->num_bytes;
    call.terms = {.deadline = std::min(deadline_of(context(), environment_.prefill_deadline),
                                       slot.arrival + environment_.prefill_deadline),
                  .cancelled = &cancelled()};
    call.done = [this, item, &slot](const AttendResult& result, uint64_t generation) {
      answer(slot, *item, result, generation);
    };
    std::vector<Lead::AttendCall> calls;
    calls.push_back(std::move(call));
    if (const Status status = environment_.lead.attend(std::move(calls)); !status.ok()) {
      fail(slot, status);
    }
  }

  void answer(Slot& slot,
              const DecodedItem& item,
              const AttendResult& result,
              uint64_t generation) {
    if (!result.status.ok()) {
      fail(slot, result.status);
      return;
    }
    v1::PrefillResponse& message = slot.response;
    const bool with_lse = item.return_lse && !result.lse.empty();
    encode_outputs(result,
                   item,
                   target_->shape(),
                   *message.mutable_output(),
                   with_lse ? message.mutable_lse() : nullptr);
    message.set_layer_length(static_cast<uint64_t>(result.layer_length));
    message.set_generation(generation);
    for (const RowSelection& selection : result.selections) {
      encode_selection(selection, *message.add_selections());
    }
    if (message.selections_size() > 0 &&
        message.ByteSizeLong() > environment_.terms.limits.max_message_bytes()) {
      message.Clear();
      message.set_seq(slot.request.chunk().seq());
      fail(slot,
           with_reason(absl::ResourceExhaustedError(
                           "the selections are larger than a message: ask for fewer rows"),
                       "ANSWER_TOO_LARGE"));
      return;
    }
    report(slot, absl::OkStatus());
    const auto begin = std::chrono::steady_clock::now();
    WorkerMetrics& metrics = environment_.metrics;
    complete(slot);  // the stream may be gone after this
    metrics.sent(std::chrono::steady_clock::now() - begin);
  }

  void fail(Slot& slot, const Status& status) {
    *slot.response.mutable_status() = to_rpc_status(status);
    report(slot, status);
    complete(slot);
  }

  void report(const Slot& slot, const Status& status) {
    RequestRecord record;
    record.operation = kChunkOperation;
    record.context_id = target_->id();
    record.status = status;
    record.duration = std::chrono::steady_clock::now() - slot.arrival;
    record.part_of_stream = true;
    observer().finished(record);
  }

  const ServiceEnvironment& environment_;
  ContextRef target_;  // null before the header
  v1::AttentionOptions options_;
};

}  // namespace

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* start_prefill_stream(
    const ServiceEnvironment& environment, grpc::CallbackServerContext* context) {
  return new PrefillStream(environment, context);
}

}  // namespace longspan
