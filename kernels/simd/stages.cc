#include "kernels/simd/stages.h"

#include "base/checked.h"

namespace longspan::simd {
namespace {

constexpr size_t round_up(size_t num_bytes) {
  return (num_bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
}

}  // namespace

Status Arena::reserve(size_t num_bytes, size_t num_takes) {
  const size_t wanted = num_bytes + num_takes * kBufferAlignment;
  if (wanted > buffer_.size()) {
    buffer_ = Buffer();  // both at once may not fit
    LONGSPAN_ASSIGN_OR_RETURN(buffer_, Buffer::allocate(wanted));
  }
  used_ = 0;
  return absl::OkStatus();
}

std::byte* Arena::take_bytes(size_t num_bytes) {
  std::byte* taken = buffer_.data() + used_;
  used_ += round_up(num_bytes);
  LONGSPAN_CHECK(used_ <= buffer_.size());
  return taken;
}

}  // namespace longspan::simd
