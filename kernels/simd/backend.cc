#include "kernels/simd/backend.h"

#include "absl/strings/str_cat.h"

#include "kernels/simd/stages.h"

namespace longspan {
namespace {

// Rows of 8 are what the narrowest vectors load; beyond 1024 channels tiles leave the caches.
constexpr int kDimMultiple = 8;
constexpr int kMaxDim = 1024;

Status unsupported_machine() {
  return absl::UnimplementedError(
      "backend: simd needs AVX2, FMA and F16C, or what $LONGSPAN_SIMD_TARGET names "
      "(avx2, avx512, avx512bf16)");
}

Status check_dim(const char* name, int dim) {
  if (dim % kDimMultiple != 0 || dim < kDimMultiple || dim > kMaxDim) {
    return absl::UnimplementedError(absl::StrCat(name,
                                                 ": the simd backend takes multiples of ",
                                                 kDimMultiple,
                                                 " up to ",
                                                 kMaxDim,
                                                 ", got ",
                                                 dim));
  }
  return absl::OkStatus();
}

class SimdBackend final : public Backend {
 public:
  SimdBackend(const simd::Target& target, int num_threads) : machine_(target, num_threads) {}

  std::string_view name() const override { return "simd"; }
  std::string detail() const override {
    const int num_threads = machine_.pool.num_threads();
    return absl::StrCat(
        machine_.target.detail, ", ", num_threads, num_threads == 1 ? " thread" : " threads");
  }
  Status supports(const Problem& problem) const override {
    LONGSPAN_RETURN_IF_ERROR(check_dim("key_dim", problem.key_dim));
    return check_dim("value_dim", problem.value_dim);
  }

  Status summarize(const SummarizeParams& params, Stream& /*stream*/) override {
    return simd::summarize(params, machine_);
  }
  Status search(const SearchParams& params, Stream& /*stream*/) override {
    return simd::search(params, machine_);
  }
  Status attend(const AttendParams& params, Stream& /*stream*/) override {
    return simd::attend(params, machine_);
  }
  Status merge(const MergeParams& params, Stream& /*stream*/) override {
    return simd::merge(params, machine_);
  }

 private:
  simd::Machine machine_;
};

// Stands in on a machine that has no target: it says so, whatever is asked.
class MissingBackend final : public Backend {
 public:
  std::string_view name() const override { return "simd"; }
  std::string detail() const override { return "no target for this machine"; }
  Status supports(const Problem& /*problem*/) const override { return unsupported_machine(); }
  Status summarize(const SummarizeParams& /*params*/, Stream& /*stream*/) override {
    return unsupported_machine();
  }
  Status search(const SearchParams& /*params*/, Stream& /*stream*/) override {
    return unsupported_machine();
  }
  Status attend(const AttendParams& /*params*/, Stream& /*stream*/) override {
    return unsupported_machine();
  }
  Status merge(const MergeParams& /*params*/, Stream& /*stream*/) override {
    return unsupported_machine();
  }
};

}  // namespace

std::unique_ptr<Backend> make_simd_backend(const BackendOptions& options) {
  const simd::Target* target = simd::choose_target();
  if (target == nullptr) {
    return std::make_unique<MissingBackend>();
  }
  return std::make_unique<SimdBackend>(*target, options.num_threads);
}

}  // namespace longspan
