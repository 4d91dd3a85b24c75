// Device memory with an owner, copies, streams, and CUDA errors as statuses.
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include "base/device.h"
#include "base/status.h"
#include "kernels/cuda/device_info.h"

namespace longspan::cuda {

// OK; RESOURCE_EXHAUSTED when device memory ran out; INTERNAL otherwise. The message names the
// call. An error of a launch is taken off the runtime, so that it is reported once.
Status to_status(cudaError_t error, std::string_view call);

// The devices that the driver offers; 0 where there is no driver.
int num_devices();
// Of the current device. UNIMPLEMENTED where there is none.
StatusOr<DeviceInfo> query_device_info();

// Owning, move-only, uninitialised device memory, aligned to 256 bytes.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer();

  static StatusOr<DeviceBuffer> allocate(size_t num_bytes);

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// In order on the stream. Ordinary host memory is read before the call returns; page-locked memory
// has to stay as it is until the stream has come to the copy.
Status copy_to_device(std::byte* device, const void* host, size_t num_bytes, cudaStream_t stream);
Status copy_to_host(void* host, const std::byte* device, size_t num_bytes, cudaStream_t stream);

// Scratch memory of the calls on one stream. It only grows, and what one call took the next call
// takes again; the stream's order keeps them apart.
class Workspace {
 public:
  // The beginning of a call: everything is free again.
  Status reset();
  // Uninitialised and aligned to 256 bytes, until the next reset(). May allocate, which a stream
  // under capture does not allow: a call of the same shape before the capture sees to that.
  StatusOr<std::byte*> take(size_t num_bytes);

 private:
  std::vector<DeviceBuffer> blocks_;  // one, unless a call took more than was there
  size_t used_ = 0;                   // bytes of the last block
};

// A stream of its own on the current device.
class CudaStream final : public Stream {
 public:
  static StatusOr<std::unique_ptr<CudaStream>> create();
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;
  ~CudaStream() override;

  Status synchronize() override;
  void* native_handle() const override { return stream_; }

 private:
  explicit CudaStream(cudaStream_t stream) : stream_(stream) {}
  cudaStream_t stream_;
};

}  // namespace longspan::cuda

// Returns from the calling function when a call of the CUDA runtime fails.
#define LONGSPAN_CUDA_RETURN_IF_ERROR(call) \
  LONGSPAN_RETURN_IF_ERROR(::longspan::cuda::to_status((call), #call))
