#include "kernels/cuda/backend.h"

#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"

#include "kernels/cuda/memory.h"
#include "kernels/cuda/stages.h"

namespace longspan {
namespace {

using cuda::DeviceInfo;
using cuda::Kernels;
using cuda::Machine;

// Rows of 8 elements are whole vectors in every type; a block of the portable attend has threads
// for 512 channels of fp32.
constexpr int kDimMultiple = 8;
constexpr int kMaxDim = 512;
constexpr int kMinComputeMajor = 8;

Status check_dim(const char* name, int dim) {
  if (dim % kDimMultiple != 0 || dim < kDimMultiple || dim > kMaxDim) {
    return absl::UnimplementedError(absl::StrCat(name,
                                                 ": the cuda backend takes multiples of ",
                                                 kDimMultiple,
                                                 " up to ",
                                                 kMaxDim,
                                                 ", got ",
                                                 dim));
  }
  return absl::OkStatus();
}

// All kernels, or those that $LONGSPAN_CUDA_KERNELS names.
StatusOr<Kernels> choose_kernels() {
  const char* wanted = std::getenv("LONGSPAN_CUDA_KERNELS");
  const std::string name = wanted == nullptr ? "all" : wanted;
  if (name == "all") {
    return Kernels::kAll;
  }
  if (name == "portable") {
    return Kernels::kPortable;
  }
  if (name == "decode") {
    return Kernels::kDecode;
  }
  if (name == "tiles") {
    return Kernels::kTiles;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "LONGSPAN_CUDA_KERNELS: must be all, portable, decode or tiles, got \"", name, "\""));
}

// The device, if the kernels run on it.
StatusOr<DeviceInfo> usable_device() {
  if (cuda::num_devices() == 0) {
    return absl::UnimplementedError("backend: cuda needs an NVIDIA GPU, and there is none");
  }
  LONGSPAN_ASSIGN_OR_RETURN(DeviceInfo device, cuda::query_device_info());
  if (device.compute_major < kMinComputeMajor) {
    return absl::UnimplementedError(absl::StrCat("backend: cuda needs compute capability ",
                                                 kMinComputeMajor,
                                                 ".0, ",
                                                 device.name,
                                                 " has ",
                                                 device.compute_major,
                                                 ".",
                                                 device.compute_minor));
  }
  return device;
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(DeviceInfo device, Kernels kernels) {
    machine_.device = std::move(device);
    machine_.kernels = kernels;
  }

  std::string_view name() const override { return "cuda"; }
  std::string detail() const override {
    const DeviceInfo& device = machine_.device;
    return absl::StrCat(device.name,
                        ", compute capability ",
                        device.compute_major,
                        ".",
                        device.compute_minor,
                        ", ",
                        device.num_sms,
                        " SMs");
  }
  BackendMemory memory() const override { return BackendMemory::kDevice; }
  Status supports(const Problem& problem) const override {
    LONGSPAN_RETURN_IF_ERROR(check_dim("key_dim", problem.key_dim));
    return check_dim("value_dim", problem.value_dim);
  }

  Status summarize(const SummarizeParams& params, Stream& stream) override {
    LONGSPAN_RETURN_IF_ERROR(begin(stream));
    return cuda::summarize(params, machine_);
  }
  Status search(const SearchParams& params, Stream& stream) override {
    LONGSPAN_RETURN_IF_ERROR(begin(stream));
    return cuda::search(params, machine_);
  }
  Status attend(const AttendParams& params, Stream& stream) override {
    LONGSPAN_RETURN_IF_ERROR(begin(stream));
    return cuda::attend(params, machine_);
  }
  Status merge(const MergeParams& params, Stream& stream) override {
    LONGSPAN_RETURN_IF_ERROR(begin(stream));
    return cuda::merge(params, machine_);
  }

 private:
  // The device and the stream of the call; scratch memory is free again.
  Status begin(Stream& stream) {
    LONGSPAN_CUDA_RETURN_IF_ERROR(cudaSetDevice(machine_.device.ordinal));
    machine_.stream = static_cast<cudaStream_t>(stream.native_handle());
    return machine_.workspace.reset();
  }

  Machine machine_;
};

// Stands in where the backend cannot be made: it gives the reason, whatever is asked.
class MissingBackend final : public Backend {
 public:
  explicit MissingBackend(Status reason) : reason_(std::move(reason)) {}

  std::string_view name() const override { return "cuda"; }
  std::string detail() const override { return "not available"; }
  BackendMemory memory() const override { return BackendMemory::kDevice; }
  Status supports(const Problem& /*problem*/) const override { return reason_; }
  Status summarize(const SummarizeParams& /*params*/, Stream& /*stream*/) override {
    return reason_;
  }
  Status search(const SearchParams& /*params*/, Stream& /*stream*/) override { return reason_; }
  Status attend(const AttendParams& /*params*/, Stream& /*stream*/) override { return reason_; }
  Status merge(const MergeParams& /*params*/, Stream& /*stream*/) override { return reason_; }

 private:
  Status reason_;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& /*options*/) {
  const StatusOr<Kernels> kernels = choose_kernels();
  if (!kernels.ok()) {
    return std::make_unique<MissingBackend>(kernels.status());
  }
  StatusOr<DeviceInfo> device = usable_device();
  if (!device.ok()) {
    return std::make_unique<MissingBackend>(device.status());
  }
  return std::make_unique<CudaBackend>(*std::move(device), *kernels);
}

}  // namespace longspan
