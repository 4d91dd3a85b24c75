// Split-KV decode for Hopper over lists of pages of one length, as a selection of blocks leaves
// them: one launch without workspace, for few rows with few pages each.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "kernels/params.h"

namespace longspan::cuda {

// An entry of a list: tokens [begin, end) of one page, 0 <= begin, end <= 64. Without tokens, the
// entry is not used, and its page is not read.
struct PageTokens {
  int32_t page = 0;  // of the row's page table
  int16_t begin = 0;
  int16_t end = 0;
};

struct AttendPagesArgs {
  // As in DecodeArgs, but that span_offsets and spans are not read.
  AttendParams params;
  const std::byte* const* const* row_pages = nullptr;
  // [T][S][max_pages], aligned to 8 bytes; entries that are not used may lie anywhere in a list. A
  // token that a list has twice counts twice.
  const PageTokens* page_lists = nullptr;
  int64_t max_pages = 0;
  int num_sms = 0;
  size_t shared_memory_per_block = 0;  // bytes, with the opt-in
  int max_cluster_size = 16;           // a power of two
  // For so many blocks' shared memory an SM has room: with two, blocks of the next launch wait
  // there already while the last ones of this launch end.
  int blocks_per_sm = 2;
};

// Null, or why this kernel cannot do it.
const char* attend_pages_declines(const AttendPagesArgs& args);
// Reads nothing before the kernels in front of it on the stream are complete, but may be launched
// while they run (programmatic dependent launch).
cudaError_t launch_attend_pages(const AttendPagesArgs& args, cudaStream_t stream);

#ifdef LONGSPAN_CUDA_SPIN_LIMIT
// Waits for the device and prints the wait that gave up, if there was one.
void report_attend_pages_spin();
#endif

}  // namespace longspan::cuda
