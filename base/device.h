// Where memory lives and work runs on the host, and the stream that a backend's calls are put on.
// Device memory and streams are kernels/cuda/memory.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>

#include "base/status.h"

namespace longspan {

inline constexpr size_t kBufferAlignment = 64;

// Owning, move-only, 64-byte aligned and uninitialised memory.
class Buffer {
 public:
  Buffer() = default;
  // RESOURCE_EXHAUSTED when the memory is not to be had.
  static StatusOr<Buffer> allocate(size_t num_bytes) {
    Buffer buffer;
    if (num_bytes > 0) {
      void* data = ::operator new (num_bytes, std::align_val_t{kBufferAlignment}, std::nothrow);
      if (data == nullptr) {
        return absl::ResourceExhaustedError("out of host memory");
      }
      buffer.data_.reset(static_cast<std::byte*>(data));
      buffer.size_ = num_bytes;
    }
    return buffer;
  }

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Release {
    void operator()(std::byte* data) const {
      ::operator delete (data, std::align_val_t{kBufferAlignment});
    }
  };
  std::unique_ptr<std::byte, Release> data_;
  size_t size_ = 0;
};

// An in-order queue of work. On the host every call has finished when it returns.
class Stream {
 public:
  Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  virtual ~Stream() = default;

  // Waits for all calls so far.
  virtual Status synchronize() { return absl::OkStatus(); }
  // The vendor's stream behind it; null on the host, and for the default stream of a device.
  virtual void* native_handle() const { return nullptr; }
};

}  // namespace longspan
