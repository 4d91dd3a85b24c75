// Scratch memory of one step: bump allocation, released all at once and kept for the next step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <type_traits>
#include <vector>

#include "base/device.h"
#include "base/status.h"

namespace longspan {

// Used by one engine thread. Memory is uninitialised and aligned to 64 bytes; pointers are valid
// until `reset`.
class Arena {
 public:
  // Null only when `count` is 0. RESOURCE_EXHAUSTED when the host has no memory left.
  template <typename Element>
  StatusOr<Element*> allocate(size_t count) {
    static_assert(std::is_trivially_destructible_v<Element>);
    LONGSPAN_ASSIGN_OR_RETURN(std::byte * bytes, allocate_bytes(count * sizeof(Element)));
    return reinterpret_cast<Element*>(bytes);
  }
  template <typename Element>
  StatusOr<std::span<Element>> allocate_span(size_t count) {
    LONGSPAN_ASSIGN_OR_RETURN(Element * data, allocate<Element>(count));
    return std::span<Element>(data, count);
  }

  void reset() {
    // After growth one buffer takes the place of several.
    if (buffers_.size() > 1) {
      size_t total = 0;
      for (const Buffer& buffer : buffers_) {
        total += buffer.size();
      }
      buffers_.clear();
      next_bytes_ = std::max(next_bytes_, total);
    }
    used_ = 0;
  }

 private:
  static constexpr size_t kFirstBytes = size_t{1} << 20;

  StatusOr<std::byte*> allocate_bytes(size_t bytes) {
    const size_t rounded = (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    if (buffers_.empty() || buffers_.back().size() - used_ < rounded) {
      LONGSPAN_ASSIGN_OR_RETURN(Buffer buffer, Buffer::allocate(std::max(rounded, next_bytes_)));
      next_bytes_ = 2 * buffer.size();
      buffers_.push_back(std::move(buffer));
      used_ = 0;
    }
    std::byte* data = buffers_.back().data() + used_;
    used_ += rounded;
    return data;
  }

  std::vector<Buffer> buffers_;
  size_t used_ = 0;  // of the last buffer
  size_t next_bytes_ = kFirstBytes;
};

}  // namespace longspan
