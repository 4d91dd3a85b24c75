// Where memory lives and work runs. Host only for now; device memory and streams join here with the
// CUDA backend.
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
  Status synchronize() { return absl::OkStatus(); }
};

}  // namespace longspan
