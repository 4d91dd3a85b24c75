#include "worker/decode_batch.h"

#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

#include "base/error_details.h"
#include "worker/call_codec.h"

namespace longspan {
namespace {

// Shared by the callbacks of the items; the last one reports.
class Batch {
 public:
  Batch(const ServiceEnvironment& environment,
        DecodeResults& results,
        int num_items,
        absl::AnyInvocable<void(Status)> done)
      : environment_(environment),
        results_(results),
        items_(static_cast<size_t>(num_items)),
        contexts_(static_cast<size_t>(num_items)),
        unanswered_(num_items),
        done_(std::move(done)) {
    results_.Reserve(num_items);
    for (int i = 0; i < num_items; ++i) {
      results_.Add();
    }
  }

  // Decodes item i: the call for the lead, or the reason why there is none.
  StatusOr<Lead::AttendCall> prepare(const v1::DecodeItem& message,
                                     int i,
                                     const std::set<std::string>* allowed,
                                     CallTerms terms) {
    if (allowed != nullptr && !allowed->contains(message.context_id())) {
      return invalid_argument("context_id", "is none of those that the stream was opened with");
    }
    const auto index = static_cast<size_t>(i);
    LONGSPAN_ASSIGN_OR_RETURN(contexts_[index], environment_.lead.find(message.context_id()));
    LONGSPAN_ASSIGN_OR_RETURN(items_[index],
                              decode_item(message, *contexts_[index], environment_.terms));
    terms.expected_generation = message.expected_generation();
    Lead::AttendCall call;
    call.context = contexts_[index];
    call.item = items_[index].item;
    call.terms = terms;
    call.num_bytes = items_[index].num_bytes;
    return call;
  }

  void answer(int i, const AttendResult& result, uint64_t generation) {
    const auto index = static_cast<size_t>(i);
    v1::DecodeResult& message = *results_.Mutable(i);
    message.set_generation(generation);
    if (!result.status.ok()) {
      fail(i, result.status);
      return;
    }
    const DecodedItem& item = items_[index];
    const bool with_lse = item.return_lse && !result.lse.empty();
    encode_outputs(result,
                   item,
                   contexts_[index]->shape(),
                   *message.mutable_output(),
                   with_lse ? message.mutable_lse() : nullptr);
    message.set_layer_length(static_cast<uint64_t>(result.layer_length));
    for (const RowSelection& selection : result.selections) {
      encode_selection(selection, *message.add_selections());
    }
    finish_one();
  }

  void fail(int i, const Status& status) {
    *results_.Mutable(i)->mutable_status() = to_rpc_status(status);
    finish_one();
  }

  void fail_all(const Status& status) { done_(status); }

 private:
  void finish_one() {
    if (unanswered_.fetch_sub(1) == 1) {
      done_(check_size());
    }
  }

  // Selections are of any size; a message is not.
  Status check_size() const {
    uint64_t bytes = 0;
    for (const v1::DecodeResult& result : results_) {
      bytes += result.selections_size() > 0 ? result.ByteSizeLong() : 0;
    }
    if (bytes <= environment_.terms.limits.max_message_bytes()) {
      return absl::OkStatus();
    }
    return with_reason(absl::ResourceExhaustedError(
                           "the selections are larger than a message: ask for fewer rows"),
                       "ANSWER_TOO_LARGE");
  }

  const ServiceEnvironment& environment_;
  DecodeResults& results_;
  std::vector<DecodedItem> items_;
  std::vector<ContextRef> contexts_;
  std::atomic<int> unanswered_;
  absl::AnyInvocable<void(Status)> done_;
};

}  // namespace

void run_decode_batch(const ServiceEnvironment& environment,
                      const DecodeItems& items,
                      DecodeResults& results,
                      const std::set<std::string>* allowed,
                      CallTerms terms,
                      absl::AnyInvocable<void(Status)> done) {
  const uint32_t max_items = environment.terms.limits.max_batch_items();
  if (items.empty() || static_cast<uint32_t>(items.size()) > max_items) {
    done(invalid_argument("items",
                          absl::StrCat("must be 1 to ", max_items, ", are ", items.size())));
    return;
  }
  auto batch = std::make_shared<Batch>(environment, results, items.size(), std::move(done));
  std::vector<Lead::AttendCall> calls;
  std::vector<std::pair<int, Status>> failures;
  for (int i = 0; i < items.size(); ++i) {
    StatusOr<Lead::AttendCall> call = batch->prepare(items[i], i, allowed, terms);
    if (!call.ok()) {
      failures.emplace_back(i, call.status());
      continue;
    }
    call->done = [batch, i](const AttendResult& result, uint64_t generation) {
      batch->answer(i, result, generation);
    };
    calls.push_back(*std::move(call));
  }
  if (!calls.empty()) {
    if (const Status status = environment.lead.attend(std::move(calls)); !status.ok()) {
      batch->fail_all(status);
      return;
    }
  }
  for (const auto& [i, status] : failures) {
    batch->fail(i, status);
  }
}

}  // namespace longspan
