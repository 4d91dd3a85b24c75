// Split-KV decode for Hopper: few query rows, each over long lists of spans.
#pragma once

#include <cstddef>

#include <cuda_runtime.h>

#include "kernels/params.h"

namespace longspan::cuda {

struct DecodeArgs {
  // query, out: of any type. kv: fp16 or bf16, in an arena whose base and pages are aligned to 128
  // bytes; its tokens number less than 2^31. Every span list is device memory.
  AttendParams params;
  // [T] page tables, one for each row, instead of kv.pages: a batch of contexts. Null: kv.pages.
  const std::byte* const* const* row_pages = nullptr;
  std::byte* workspace = nullptr;  // of decode_workspace_bytes(), aligned to 16 bytes
  int num_sms = 0;
  size_t shared_memory_per_block = 0;  // bytes, with the opt-in
};

// Null, or why this kernel cannot do it.
const char* decode_declines(const DecodeArgs& args);
size_t decode_workspace_bytes(const DecodeArgs& args);
// Reads nothing before the kernels in front of it on the stream are complete, but may be launched
// while they run (programmatic dependent launch).
cudaError_t launch_attend_decode(const DecodeArgs& args, cudaStream_t stream);

#ifdef LONGSPAN_CUDA_SPIN_LIMIT
// Waits for the device and prints the wait that gave up, if there was one.
void report_decode_spin();
#endif

}  // namespace longspan::cuda
