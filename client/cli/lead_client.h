// The coordinator's view of the lead that lives in the same process.
#pragma once

#include <string>
#include <vector>

#include "coordinator/worker_client.h"
#include "worker/lead.h"
#include "worker/spec_codec.h"

namespace longspan {

class LeadClient final : public WorkerClient {
 public:
  LeadClient(Lead& lead, ServerTerms terms, v1::GetCapabilitiesResponse capabilities);

  v1::GetCapabilitiesResponse capabilities() const override { return capabilities_; }
  v1::CheckSpecResponse check_spec(const v1::ContextSpec& spec) const override;
  void create(const std::string& context_id,
              const v1::ContextSpec& spec,
              ContextDone done) override;
  void describe(std::vector<std::string> context_ids, ContextsDone done) override;
  void fork(const v1::ForkContextRequest& request, ContextDone done) override;
  void truncate(const v1::TruncateContextRequest& request, ContextDone done) override;
  void remove(const v1::DeleteContextRequest& request, ContextDone done) override;
  std::chrono::nanoseconds idle_time(const std::string& context_id) const override;

 private:
  Lead& lead_;
  ServerTerms terms_;
  v1::GetCapabilitiesResponse capabilities_;
};

}  // namespace longspan
