#include "client/cli/lead_client.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/error_details.h"

namespace longspan {
namespace {

v1::Context encode_state(const ContextState& state) {
  v1::Context message;
  message.set_context_id(state.context->id());
  message.set_committed_length(static_cast<uint64_t>(state.committed_length()));
  for (const int64_t length : state.layer_lengths) {
    message.add_layer_lengths(static_cast<uint64_t>(length));
  }
  message.set_generation(state.generation);
  message.set_kv_bytes(static_cast<uint64_t>(state.kv_bytes));
  message.set_summary_bytes(static_cast<uint64_t>(state.summary_bytes));
  return message;
}

// Hands on what the lead says in the wire's words.
Lead::StateDone encode_for(WorkerClient::ContextDone done) {
  return [done = std::move(done)](StatusOr<ContextState> state) mutable {
    if (state.ok()) {
      done(encode_state(*state));
    } else {
      done(state.status());
    }
  };
}

// Positions that no context reaches are as good as any: both are beyond its end.
int64_t decode_tokens(uint64_t num_tokens) {
  constexpr uint64_t kFarthest = uint64_t{1} << 48;
  return static_cast<int64_t>(std::min(num_tokens, kFarthest));
}

}  // namespace

LeadClient::LeadClient(Lead& lead, ServerTerms terms, v1::GetCapabilitiesResponse capabilities)
    : lead_(lead), terms_(std::move(terms)), capabilities_(std::move(capabilities)) {}

v1::CheckSpecResponse LeadClient::check_spec(const v1::ContextSpec& spec) const {
  Findings findings;
  const DecodedSpec decoded = decode_spec(spec, terms_, findings);
  v1::CheckSpecResponse response;
  const auto add = [&response](const std::vector<FieldError>& errors, const char* code) {
    for (const FieldError& error : errors) {
      v1::CheckSpecResponse::Reason& reason = *response.add_reasons();
      reason.set_field(error.field);
      reason.set_description(error.description);
      reason.set_code(code);
    }
  };
  add(findings.invalid, "INVALID_ARGUMENT");
  add(findings.unserved, "UNIMPLEMENTED");
  if (findings.empty()) {
    response.set_kv_bytes_per_token(static_cast<uint64_t>(kv_bytes_per_token(decoded.shape)));
    response.set_summary_bytes_per_token(summary_bytes_per_token(decoded.shape));
  }
  return response;
}

void LeadClient::create(const std::string& context_id,
                        const v1::ContextSpec& spec,
                        ContextDone done) {
  Findings findings;
  DecodedSpec decoded = decode_spec(spec, terms_, findings);
  if (!findings.empty()) {
    for (auto* errors : {&findings.invalid, &findings.unserved}) {
      for (FieldError& error : *errors) {
        error.field = field_path("spec", error.field);
      }
    }
    done(findings.status());
    return;
  }
  v1::ContextSpec effective = effective_spec(spec, decoded);
  lead_.create(context_id,
               std::move(decoded.shape),
               decoded.default_method,
               [effective = std::move(effective),
                done = std::move(done)](StatusOr<ContextState> state) mutable {
                 if (!state.ok()) {
                   done(state.status());
                   return;
                 }
                 v1::Context context = encode_state(*state);
                 context.mutable_spec()->Swap(&effective);
                 done(std::move(context));
               });
}

void LeadClient::describe(std::vector<std::string> context_ids, ContextsDone done) {
  lead_.describe(
      std::move(context_ids),
      [done = std::move(done)](const StatusOr<std::vector<ContextState>>& states) mutable {
        if (!states.ok()) {
          done(states.status());
          return;
        }
        std::vector<v1::Context> messages;
        messages.reserve(states->size());
        for (const ContextState& state : *states) {
          messages.push_back(encode_state(state));
        }
        done(std::move(messages));
      });
}

void LeadClient::fork(const v1::ForkContextRequest& request, ContextDone done) {
  StatusOr<ContextRef> parent = lead_.find(request.context_id());
  if (!parent.ok()) {
    done(parent.status());
    return;
  }
  lead_.fork(*std::move(parent),
             request.new_context_id(),
             decode_tokens(request.num_tokens()),
             {.expected_generation = request.expected_generation()},
             encode_for(std::move(done)));
}

void LeadClient::truncate(const v1::TruncateContextRequest& request, ContextDone done) {
  StatusOr<ContextRef> context = lead_.find(request.context_id());
  if (!context.ok()) {
    done(context.status());
    return;
  }
  lead_.truncate(*std::move(context),
                 decode_tokens(request.num_tokens()),
                 {.expected_generation = request.expected_generation()},
                 encode_for(std::move(done)));
}

void LeadClient::remove(const v1::DeleteContextRequest& request, ContextDone done) {
  StatusOr<ContextRef> context = lead_.find(request.context_id());
  if (!context.ok()) {
    done(context.status());
    return;
  }
  lead_.remove(*std::move(context),
               {.expected_generation = request.expected_generation()},
               encode_for(std::move(done)));
}

std::chrono::nanoseconds LeadClient::idle_time(const std::string& context_id) const {
  return lead_.idle_time(context_id);
}

}  // namespace longspan
