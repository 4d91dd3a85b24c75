// Keeps the summaries of a shard in step with its tokens.
#pragma once

#include <cstdint>

#include "base/status.h"
#include "kernels/backend.h"
#include "worker/shard_store.h"

namespace longspan {

// Makes the entries that became complete when a layer grew from `begin` to `end` tokens; the rows
// are stored already. Each entry is made by the owner of its first token (and, as halo, by the
// owner of the stripe that it reaches into), from local bytes alone.
Status update_summaries(ShardStore& store,
                        ContextShard& shard,
                        int layer,
                        int64_t begin,
                        int64_t end,
                        Backend& backend,
                        Stream& stream);

}  // namespace longspan
