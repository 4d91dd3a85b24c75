// What the policies ask about a device. Plain data: no CUDA header, so that policies are tested
// where there is no device.
#pragma once

#include <cstddef>
#include <string>

namespace longspan::cuda {

struct DeviceInfo {
  int ordinal = 0;
  std::string name;
  int compute_major = 0;
  int compute_minor = 0;
  int num_sms = 0;
  size_t shared_memory_per_block = 0;  // bytes, with the opt-in
  size_t shared_memory_per_sm = 0;     // bytes
  size_t l2_bytes = 0;
  size_t memory_bytes = 0;

  // Where wgmma, TMA and the other instructions of sm_90a are.
  bool is_hopper() const { return compute_major == 9 && compute_minor == 0; }
};

}  // namespace longspan::cuda
