// Tensor maps over an arena of pages: how TMA finds a tile of keys or values.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda.h>
#include <cuda_runtime.h>

#include "base/data_type.h"

namespace longspan::cuda {

// A map that serves every page of an arena: rows of `dim` 16-bit elements, a multiple of 64, seen
// as `dim` / 64 planes of 64 elements (128 bytes). A box is `box_planes` planes of `box_rows` rows
// and arrives as [plane][row][64] with the 128-byte swizzle, which is what wgmma_descriptor (ptx.h)
// describes. The coordinates of the tile that begins at byte `offset` of the arena, a multiple of
// 128, are
//   (0, offset / (2 * dim), offset % (2 * dim) / 128)
// so that a tile need not begin at a multiple of the row. At most 2^32 rows.
//
// Call it again when the arena moves. Fails where the driver has no tensor maps or the arena is not
// aligned to 16 bytes.
cudaError_t make_page_map(CUtensorMap* map,
                          const void* arena,
                          size_t arena_bytes,
                          DataType dtype,
                          int dim,
                          int box_rows,
                          int box_planes);

// A copy of queries: so many heads of so many tokens, at most 256 each.
struct QueryBox {
  int heads = 0;
  int tokens = 0;
};

// A map over queries [num_queries][num_heads][dim] of 16 bits. A box is 64 of the columns and
// arrives as [token][head][64] with the 128-byte swizzle; its coordinates are (column, head,
// token). What lies behind the last query arrives as zeros; with num_queries 0 nothing asked for
// may lie there.
cudaError_t make_query_map(CUtensorMap* map,
                           const void* query,
                           int64_t num_queries,
                           int num_heads,
                           DataType dtype,
                           int dim,
                           QueryBox box);

}  // namespace longspan::cuda
