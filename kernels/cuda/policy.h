// What the CUDA backend decides from shapes: how a stage's work is cut. Pure functions of plain
// data, without CUDA headers, tested where there is no device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_info.h"

namespace longspan::cuda {

// How many blocks the tokens of each list of the portable attend are dealt to: enough to fill the
// device, of 1024 tokens at least. `num_rows`: rows times heads.
int attend_splits(int64_t num_rows, int64_t num_tokens, const DeviceInfo& device);

// Which kernels attend: the ones for tiles of rows fetch a page once for all rows of a tile, but
// have no more work to deal out than there are tiles; the ones for decode share out the tokens.
// `num_rows` query tokens, `group` query heads a KV head.
bool prefers_decode(int64_t num_rows, int group);

// What the choice of tiles depends on.
struct TileShape {
  int key_dim = 0;
  int value_dim = 0;
  int group = 1;            // query heads of a KV head
  int lists_per_token = 1;  // in a tile: 1, or one a head
};
// Query rows in a tile of attention of many rows. More share what is fetched, if what they attend
// to is the same: `alike_rows` neighbours (tokens times heads of a KV head) see the same pages.
int attend_tile_rows(const TileShape& shape, int64_t alike_rows);

// KV heads that are worked on at a time, so that their keys and values stay in L2: about as many in
// each section.
int section_heads(int num_kv_heads, int64_t bytes_per_head, const DeviceInfo& device);

// Threads of a block of the portable search, and keys that arrive at its queue at once.
inline constexpr int kSearchThreads = 256;

// How the portable search is cut.
struct SearchGrid {
  int num_splits = 1;          // blocks for the candidates of each list
  int64_t num_blocks = 0;      // that stride over the splits of all lists
  int64_t queue_capacity = 0;  // keys, a power of two
  bool shared_queue = true;    // whether the queue fits in shared memory
};
SearchGrid search_grid(int64_t num_lists,
                       int64_t num_entries,
                       int64_t max_k,
                       const DeviceInfo& device);

}  // namespace longspan::cuda
