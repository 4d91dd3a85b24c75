#include "kernels/reference/backend.h"

#include "kernels/reference/stages.h"

namespace longspan {
namespace {

class ReferenceBackend final : public Backend {
 public:
  std::string_view name() const override { return "reference"; }
  std::string detail() const override { return "double precision, 1 thread"; }
  Status supports(const Problem& /*problem*/) const override { return absl::OkStatus(); }

  Status summarize(const SummarizeParams& params, Stream& /*stream*/) override {
    reference::summarize(params);
    return absl::OkStatus();
  }
  Status search(const SearchParams& params, Stream& /*stream*/) override {
    reference::search(params);
    return absl::OkStatus();
  }
  Status attend(const AttendParams& params, Stream& /*stream*/) override {
    reference::attend(params);
    return absl::OkStatus();
  }
  Status merge(const MergeParams& params, Stream& /*stream*/) override {
    reference::merge(params);
    return absl::OkStatus();
  }
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend(const BackendOptions& /*options*/) {
  return std::make_unique<ReferenceBackend>();
}

}  // namespace longspan
