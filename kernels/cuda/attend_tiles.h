// Attention of many rows on Hopper, dense or over span lists: the launch. attend_tiles.cu says how.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "kernels/params.h"

namespace longspan::cuda {

struct AttendTilesArgs {
  // The arena of params.kv is known, the query has the type of the cache.
  AttendParams params;
  int tile_rows = 64;          // 64, 128 or 192, at least the query heads of a KV head
  int num_sms = 0;             // of the device
  int section_heads = 1;       // KV heads whose keys and values share L2
  int32_t* scratch = nullptr;  // [attend_tiles_scratch(params)]
};

// Shapes that the kernel has: the rest of what it needs is Hopper and a known arena.
bool attend_tiles_supports(const AttendParams& params);

// Elements of scratch memory: two counters and a list of as many rows as there may be.
int64_t attend_tiles_scratch(const AttendParams& params);

// Asynchronous on the stream; sets the scratch memory itself. Values that are not finite stay with
// the rows that see them: rows of the same tile are made again by another kernel, one by one.
cudaError_t launch_attend_tiles(const AttendTilesArgs& args, cudaStream_t stream);

}  // namespace longspan::cuda
