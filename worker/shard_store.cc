#include "worker/shard_store.h"

#include <algorithm>
#include <cstring>

#include "base/checked.h"

namespace longspan {
namespace {

std::vector<ShardMap> maps_of(const ContextShape& shape) {
  std::vector<ShardMap> maps;
  maps.reserve(static_cast<size_t>(shape.layout.num_ranks));
  for (int rank = 0; rank < shape.layout.num_ranks; ++rank) {
    maps.emplace_back(shape, rank);
  }
  return maps;
}

}  // namespace

ContextShard::ContextShard(ContextHandle context, ContextShape context_shape, int rank)
    : handle(context),
      shape(std::move(context_shape)),
      maps(maps_of(shape)),
      map(maps[static_cast<size_t>(rank)]),
      layers(static_cast<size_t>(shape.num_layers)) {
  for (LayerShard& layer : layers) {
    layer.streams.resize(map.streams().size());
  }
}

int64_t ContextShard::committed() const {
  int64_t tokens = layers.empty() ? 0 : layers[0].visible;
  for (const LayerShard& layer : layers) {
    tokens = std::min(tokens, layer.visible);
  }
  return tokens;
}

ContextShard* ShardStore::find(ContextHandle context) {
  const auto found = contexts_.find(context);
  return found == contexts_.end() ? nullptr : found->second.get();
}

void ShardStore::create(ContextHandle context, ContextShape shape) {
  auto shard = std::make_unique<ContextShard>(context, std::move(shape), rank_);
  const bool is_new = contexts_.emplace(context, std::move(shard)).second;
  LONGSPAN_CHECK(is_new);
}

void ShardStore::remove(ContextShard& shard) {
  for (LayerShard& layer : shard.layers) {
    for (PageTable& table : layer.streams) {
      shrink(table, 0);
    }
  }
  contexts_.erase(shard.handle);
}

void ShardStore::fork(ContextShard& parent, ContextHandle child_handle, int64_t num_tokens) {
  create(child_handle, parent.shape);
  ContextShard& child = *find(child_handle);
  for (size_t i = 0; i < parent.layers.size(); ++i) {
    LayerShard& from = parent.layers[i];
    LayerShard& to = child.layers[i];
    to.visible = to.staged = std::min(num_tokens, from.visible);
    from.may_be_shared = to.may_be_shared = true;
    for (size_t stream = 0; stream < from.streams.size(); ++stream) {
      const int64_t entries = child.map.num_entries(static_cast<int>(stream), to.visible);
      const auto pages = static_cast<std::ptrdiff_t>(divide_up(entries, kPageTokens));
      const PageTable& table = from.streams[stream];
      to.streams[stream].ids.assign(table.ids.begin(), table.ids.begin() + pages);
      to.streams[stream].data.assign(table.data.begin(), table.data.begin() + pages);
      for (const PageId page : to.streams[stream].ids) {
        pool_.add_reference(page);
      }
    }
  }
}

void ShardStore::truncate(ContextShard& shard, int64_t num_tokens) {
  for (int layer = 0; layer < shard.shape.num_layers; ++layer) {
    const int64_t visible = shard.layers[static_cast<size_t>(layer)].visible;
    truncate_layer(shard, layer, std::min(num_tokens, visible));
  }
}

void ShardStore::truncate_layer(ContextShard& shard, int layer, int64_t num_tokens) {
  LayerShard& state = shard.layers[static_cast<size_t>(layer)];
  state.staged = std::min(state.staged, num_tokens);
  state.visible = std::min(state.visible, num_tokens);
  for (size_t stream = 0; stream < state.streams.size(); ++stream) {
    shrink(state.streams[stream], shard.map.num_entries(static_cast<int>(stream), state.staged));
  }
}

void ShardStore::rollback(ContextShard& shard) {
  for (int layer = 0; layer < shard.shape.num_layers; ++layer) {
    truncate_layer(shard, layer, shard.layers[static_cast<size_t>(layer)].visible);
  }
}

void ShardStore::shrink(PageTable& table, int64_t num_entries) {
  const auto pages = static_cast<size_t>(divide_up(num_entries, kPageTokens));
  while (table.ids.size() > pages) {
    pool_.release(table.ids.back());
    table.ids.pop_back();
    table.data.pop_back();
  }
}

Status ShardStore::make_writable(
    ContextShard& shard, int layer, int stream, int64_t first_entry, int64_t num_entries) {
  if (num_entries == 0) {
    return absl::OkStatus();
  }
  PageTable& table = shard.layers[static_cast<size_t>(layer)].streams[static_cast<size_t>(stream)];
  const size_t bytes = shard.map.streams()[static_cast<size_t>(stream)].page_bytes();
  const auto first = static_cast<size_t>(first_entry / kPageTokens);
  const auto end = static_cast<size_t>(divide_up(first_entry + num_entries, kPageTokens));
  for (size_t i = std::min(first, table.ids.size()); i < end; ++i) {
    const PageTag tag{shard.handle, layer, stream, static_cast<int64_t>(i) * kPageTokens};
    if (i == table.ids.size()) {
      LONGSPAN_ASSIGN_OR_RETURN(const PageId page, pool_.allocate(bytes, tag));
      table.ids.push_back(page);
      table.data.push_back(pool_.data(page));
    } else if (pool_.is_shared(table.ids[i])) {
      LONGSPAN_ASSIGN_OR_RETURN(const PageId page, pool_.allocate(bytes, tag));
      std::memcpy(pool_.data(page), table.data[i], bytes);
      pool_.release(table.ids[i]);
      table.ids[i] = page;
      table.data[i] = pool_.data(page);
    }
  }
  return absl::OkStatus();
}

Status ShardStore::write(ContextShard& shard,
                         int layer,
                         const WriteSegment& segment,
                         const TokenRows& rows) {
  LONGSPAN_RETURN_IF_ERROR(
      make_writable(shard, layer, segment.stream, segment.first_entry, segment.num_rows));
  const PagedView target =
      view(shard, layer, segment.stream, segment.first_entry + segment.num_rows);
  const auto key_dim = static_cast<size_t>(target.key_dim);
  const auto value_dim = static_cast<size_t>(target.value_dim);
  const std::byte* key = rows.keys;
  const std::byte* value = rows.values;
  for (int64_t row = 0; row < segment.num_rows; ++row) {
    for (int head = 0; head < target.num_kv_heads; ++head) {
      // The pages were made writable above; views are read-only for everybody else.
      auto* key_out = const_cast<std::byte*>(target.key(segment.first_entry + row, head));
      auto* value_out = const_cast<std::byte*>(target.value(segment.first_entry + row, head));
      convert_elements(rows.dtype, key, target.dtype, key_out, key_dim);
      convert_elements(rows.dtype, value, target.dtype, value_out, value_dim);
      key += key_dim * size_of(rows.dtype);
      value += value_dim * size_of(rows.dtype);
    }
  }
  return absl::OkStatus();
}

int64_t ShardStore::first_difference(const ContextShard& shard,
                                     int layer,
                                     const WriteSegment& segment,
                                     const TokenRows& rows) const {
  const PagedView stored =
      view(shard, layer, segment.stream, segment.first_entry + segment.num_rows);
  const auto key_dim = static_cast<size_t>(stored.key_dim);
  const auto value_dim = static_cast<size_t>(stored.value_dim);
  const size_t element = size_of(stored.dtype);
  std::vector<std::byte> converted((key_dim + value_dim) * element);
  const std::byte* key = rows.keys;
  const std::byte* value = rows.values;
  for (int64_t row = 0; row < segment.num_rows; ++row) {
    for (int head = 0; head < stored.num_kv_heads; ++head) {
      const int64_t entry = segment.first_entry + row;
      convert_elements(rows.dtype, key, stored.dtype, converted.data(), key_dim);
      convert_elements(
          rows.dtype, value, stored.dtype, converted.data() + key_dim * element, value_dim);
      if (std::memcmp(converted.data(), stored.key(entry, head), key_dim * element) != 0 ||
          std::memcmp(converted.data() + key_dim * element,
                      stored.value(entry, head),
                      value_dim * element) != 0) {
        return row;
      }
      key += key_dim * size_of(rows.dtype);
      value += value_dim * size_of(rows.dtype);
    }
  }
  return -1;
}

PagedView ShardStore::view(const ContextShard& shard,
                           int layer,
                           int stream,
                           int64_t num_entries) const {
  const StreamSpec& spec = shard.map.streams()[static_cast<size_t>(stream)];
  const PageTable& table =
      shard.layers[static_cast<size_t>(layer)].streams[static_cast<size_t>(stream)];
  return {
      table.data.data(), num_entries, spec.dtype, spec.num_kv_heads, spec.key_dim, spec.value_dim};
}

}  // namespace longspan
