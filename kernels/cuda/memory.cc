#include "kernels/cuda/memory.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"

namespace longspan::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kMinBlockBytes = size_t{1} << 20;

size_t attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? static_cast<size_t>(value)
                                                                      : 0;
}

}  // namespace

Status to_status(cudaError_t error, std::string_view call) {
  if (error == cudaSuccess) {
    return absl::OkStatus();
  }
  cudaGetLastError();
  const std::string message = absl::StrCat("CUDA: ",
                                           std::string(call.substr(0, call.find('('))),
                                           ": ",
                                           cudaGetErrorName(error),
                                           ", ",
                                           cudaGetErrorString(error));
  return error == cudaErrorMemoryAllocation ? absl::ResourceExhaustedError(message)
                                            : absl::InternalError(message);
}

int num_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

StatusOr<DeviceInfo> query_device_info() {
  if (num_devices() == 0) {
    return absl::UnimplementedError("no CUDA device");
  }
  DeviceInfo info;
  LONGSPAN_CUDA_RETURN_IF_ERROR(cudaGetDevice(&info.ordinal));
  cudaDeviceProp properties;
  LONGSPAN_CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, info.ordinal));
  info.name = properties.name;
  info.compute_major = properties.major;
  info.compute_minor = properties.minor;
  info.num_sms = properties.multiProcessorCount;
  info.shared_memory_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, info.ordinal);
  info.shared_memory_per_sm = properties.sharedMemPerMultiprocessor;
  info.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
  info.memory_bytes = properties.totalGlobalMem;
  return info;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) {
    cudaFree(data_);  // fails only after an error that has been reported, or as the process ends
  }
}

StatusOr<DeviceBuffer> DeviceBuffer::allocate(size_t num_bytes) {
  DeviceBuffer buffer;
  if (num_bytes > 0) {
    void* data = nullptr;
    LONGSPAN_CUDA_RETURN_IF_ERROR(cudaMalloc(&data, num_bytes));
    buffer.data_ = static_cast<std::byte*>(data);
    buffer.size_ = num_bytes;
  }
  return buffer;
}

Status copy_to_device(std::byte* device, const void* host, size_t num_bytes, cudaStream_t stream) {
  if (num_bytes == 0) {
    return absl::OkStatus();
  }
  return to_status(cudaMemcpyAsync(device, host, num_bytes, cudaMemcpyHostToDevice, stream),
                   "cudaMemcpyAsync");
}

Status copy_to_host(void* host, const std::byte* device, size_t num_bytes, cudaStream_t stream) {
  if (num_bytes == 0) {
    return absl::OkStatus();
  }
  return to_status(cudaMemcpyAsync(host, device, num_bytes, cudaMemcpyDeviceToHost, stream),
                   "cudaMemcpyAsync");
}

Status Workspace::reset() {
  used_ = 0;
  if (blocks_.size() <= 1) {
    return absl::OkStatus();
  }
  // The last call outgrew its block: from now on one block holds what it took.
  size_t total = 0;
  for (const DeviceBuffer& block : blocks_) {
    total += block.size();
  }
  blocks_.clear();
  LONGSPAN_ASSIGN_OR_RETURN(DeviceBuffer block, DeviceBuffer::allocate(total));
  blocks_.push_back(std::move(block));
  return absl::OkStatus();
}

StatusOr<std::byte*> Workspace::take(size_t num_bytes) {
  const size_t rounded =
      (std::max<size_t>(num_bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  if (blocks_.empty() || blocks_.back().size() - used_ < rounded) {
    LONGSPAN_ASSIGN_OR_RETURN(DeviceBuffer block,
                              DeviceBuffer::allocate(std::max(rounded, kMinBlockBytes)));
    blocks_.push_back(std::move(block));
    used_ = 0;
  }
  std::byte* taken = blocks_.back().data() + used_;
  used_ += rounded;
  return taken;
}

StatusOr<std::unique_ptr<CudaStream>> CudaStream::create() {
  cudaStream_t stream = nullptr;
  LONGSPAN_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return std::unique_ptr<CudaStream>(new CudaStream(stream));
}

CudaStream::~CudaStream() { cudaStreamDestroy(stream_); }

Status CudaStream::synchronize() {
  return to_status(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

}  // namespace longspan::cuda
