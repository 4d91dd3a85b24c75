// What one rank holds: its shard of every context, as tables of pages. Lengths are the context's,
// the same on every rank; tables are the rank's own.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "kernels/params.h"
#include "worker/group.h"
#include "worker/page_pool.h"
#include "worker/rows.h"
#include "worker/streams.h"

namespace longspan {

// The pages of a stream, in order.
struct PageTable {
  std::vector<PageId> ids;
  std::vector<std::byte*> data;  // of the same pages, for views
};

struct LayerShard {
  int64_t visible = 0;  // tokens that queries see
  int64_t staged = 0;   // tokens stored, at least `visible`
  // Forked or a fork: pages may have another holder. Stays set, so that what growth takes is at
  // most over-estimated.
  bool may_be_shared = false;
  std::vector<PageTable> streams;  // as ShardMap::streams()
};

struct ContextShard {
  ContextShard(ContextHandle context, ContextShape context_shape, int rank);

  const ContextHandle handle;
  const ContextShape shape;
  std::vector<ShardMap> maps;  // of every rank
  const ShardMap& map;         // of this rank
  std::vector<LayerShard> layers;

  // Tokens that every layer shows.
  int64_t committed() const;
};

// Used by the rank's engine thread alone.
class ShardStore {
 public:
  ShardStore(int rank, int64_t capacity_bytes) : rank_(rank), pool_(capacity_bytes) {}

  const PagePool& pool() const { return pool_; }
  ContextShard* find(ContextHandle context);

  void create(ContextHandle context, ContextShape shape);
  void remove(ContextShard& shard);
  // The child shares the first `num_tokens` of every layer until either writes.
  void fork(ContextShard& parent, ContextHandle child, int64_t num_tokens);
  // Keeps at most `num_tokens` tokens, and no staged ones.
  void truncate(ContextShard& shard, int64_t num_tokens);
  void truncate_layer(ContextShard& shard, int layer, int64_t num_tokens);
  void rollback(ContextShard& shard);

  // Makes entries [first, first + count) of a stream writable: new pages behind the table's end,
  // copies of shared ones.
  Status make_writable(
      ContextShard& shard, int layer, int stream, int64_t first_entry, int64_t num_entries);
  // Stores a segment's rows, converted to the stream's type.
  Status write(ContextShard& shard, int layer, const WriteSegment& segment, const TokenRows& rows);
  // The first row of the segment whose bytes, after conversion, differ from what is stored; -1 if
  // none does.
  int64_t first_difference(const ContextShard& shard,
                           int layer,
                           const WriteSegment& segment,
                           const TokenRows& rows) const;

  PagedView view(const ContextShard& shard, int layer, int stream, int64_t num_entries) const;

 private:
  void shrink(PageTable& table, int64_t num_entries);

  const int rank_;
  PagePool pool_;
  std::unordered_map<ContextHandle, std::unique_ptr<ContextShard>> contexts_;
};

}  // namespace longspan
