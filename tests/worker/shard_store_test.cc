// What a rank keeps, against counting by hand; and that growing takes exactly the bytes that the
// lead reckons with.
#include "worker/shard_store.h"

#include <set>

#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "tests/support/cases.h"
#include "tests/support/methods.h"
#include "worker/summaries.h"

namespace longspan::testing {
namespace {

constexpr int64_t kMaxTokens = 900;

ContextShape shape_with(std::vector<Method> methods, LayoutKind kind, int num_ranks) {
  ContextShape shape;
  shape.num_layers = 2;
  shape.num_query_heads = 2;
  shape.num_kv_heads = 1;
  shape.key_dim = 8;
  shape.value_dim = 16;
  shape.kv_dtype = DataType::kFloat32;
  shape.methods = std::move(methods);
  shape.max_tokens = kMaxTokens;
  int64_t alignment = 64;
  for (const Method& method : shape.methods) {
    alignment = std::max(alignment, method.alignment_tokens());
  }
  const int64_t stripe = kind == LayoutKind::kBlockCyclic ? alignment : 0;
  shape.layout = *Layout::make(kind, num_ranks, stripe, kMaxTokens, alignment);
  return shape;
}

std::vector<ContextShape> shapes() {
  std::vector<ContextShape> all;
  for (const LayoutKind kind :
       {LayoutKind::kBlockCyclic, LayoutKind::kContiguous, LayoutKind::kZigzag}) {
    for (const int ranks : {1, 2, 3, 4}) {
      all.push_back(shape_with({nsa_method(32, 16, 64, 4, 96),
                                quest_method(16, 4),
                                moba_method(128, 2),
                                nsa_method(64, 8, 64, 4, 96)},
                               kind,
                               ranks));
    }
  }
  return all;
}

// Windows before `num_tokens` that a rank has to keep as its own: those whose first token it owns.
int64_t count_summaries(const Layout& layout,
                        int rank,
                        const SummarySpec& spec,
                        int64_t num_tokens) {
  int64_t count = 0;
  for (int64_t begin = 0; begin + spec.span() <= num_tokens; begin += spec.stride()) {
    count += layout.owner(begin) == rank ? 1 : 0;
  }
  return count;
}

TEST(ShardMap, CountsSummariesByTheirFirstToken) {
  for (const ContextShape& shape : shapes()) {
    for (int rank = 0; rank < shape.layout.num_ranks; ++rank) {
      const ShardMap map(shape, rank);
      for (size_t summary = 0; summary < map.summaries().size(); ++summary) {
        const int stream = map.summary_stream(static_cast<int>(summary));
        for (int64_t tokens = 0; tokens <= kMaxTokens; tokens += 7) {
          ASSERT_EQ(map.num_entries(stream, tokens),
                    count_summaries(shape.layout, rank, map.summaries()[summary], tokens));
        }
      }
    }
  }
}

TEST(ShardMap, SeamsHoldBothSidesOfEveryStripeEnd) {
  for (const ContextShape& shape : shapes()) {
    const Layout& layout = shape.layout;
    for (int rank = 0; rank < layout.num_ranks; ++rank) {
      const ShardMap map(shape, rank);
      for (size_t summary = 0; summary < map.summaries().size(); ++summary) {
        const int index = static_cast<int>(summary);
        const int seam = map.seam_stream(index);
        ASSERT_EQ(seam >= 0, layout.num_ranks > 1 && map.overlap(index) > 0);
        if (seam < 0) {
          continue;
        }
        std::set<int64_t> entries;
        int64_t copies = 0;
        for (int64_t token = 0; token < kMaxTokens; ++token) {
          // By hand: once for each stripe end within reach that this rank owns a side of.
          for (int64_t end = layout.stripe_tokens;
               end < layout.num_stripes() * layout.stripe_tokens &&
               end <= kMaxTokens + map.overlap(index);
               end += layout.stripe_tokens) {
            if (token >= end - map.overlap(index) && token < end + map.overlap(index)) {
              copies += layout.owner(end - 1) == rank ? 1 : 0;
              copies += layout.owner(end) == rank ? 1 : 0;
            }
          }
          for (const WriteSegment& segment : map.write_segments(token, token + 1)) {
            if (segment.stream == seam) {
              ASSERT_TRUE(entries.insert(segment.first_entry).second);
            }
          }
          const int64_t last = entries.empty() ? 0 : *entries.rbegin() + 1;
          ASSERT_EQ(map.num_entries(seam, token + 1), last)
              << "rank " << rank << " token " << token;
        }
        ASSERT_EQ(static_cast<int64_t>(entries.size()), copies);
      }
    }
  }
}

TEST(ShardMap, RunsOfRowsGoWhereSingleRowsGo) {
  Random random(3);
  for (const ContextShape& shape : shapes()) {
    for (int rank = 0; rank < shape.layout.num_ranks; ++rank) {
      const ShardMap map(shape, rank);
      const int64_t begin = random.between(0, kMaxTokens - 1);
      const int64_t end = random.between(begin, kMaxTokens);
      using Place = std::tuple<int, int64_t, int64_t>;
      std::set<Place> singles;
      for (int64_t token = begin; token < end; ++token) {
        for (const WriteSegment& segment : map.write_segments(token, token + 1)) {
          singles.insert({segment.stream, segment.first_entry, token});
        }
      }
      std::set<Place> runs;
      for (const WriteSegment& segment : map.write_segments(begin, end)) {
        for (int64_t row = 0; row < segment.num_rows; ++row) {
          runs.insert({segment.stream, segment.first_entry + row, segment.first_token + row});
        }
      }
      ASSERT_EQ(runs, singles);
    }
  }
}

// A store with rows that tell their token and layer.
class Storage {
 public:
  Storage(const ContextShape& shape, int rank)
      : backend_(*make_backend("reference", {})), store_(rank, int64_t{1} << 30) {
    store_.create(1, shape);
  }

  ShardStore& store() { return store_; }
  ContextShard& shard(ContextHandle handle) { return *store_.find(handle); }

  void grow(ContextHandle handle, int layer, int64_t end, float salt) {
    ContextShard& context = shard(handle);
    LayerShard& state = context.layers[static_cast<size_t>(layer)];
    const int64_t begin = state.staged;
    for (const WriteSegment& segment : context.map.write_segments(begin, end)) {
      std::vector<float> keys;
      std::vector<float> values;
      for (int64_t row = 0; row < segment.num_rows; ++row) {
        keys.insert(keys.end(), 8, static_cast<float>(segment.first_token + row) + salt);
        values.insert(values.end(), 16, -static_cast<float>(segment.first_token + row) - salt);
      }
      const TokenRows rows{DataType::kFloat32,
                           reinterpret_cast<const std::byte*>(keys.data()),
                           reinterpret_cast<const std::byte*>(values.data())};
      ASSERT_TRUE(store_.write(context, layer, segment, rows).ok());
    }
    ASSERT_TRUE(update_summaries(store_, context, layer, begin, end, *backend_, stream_).ok());
    state.staged = state.visible = end;
  }

  void expect_tokens(ContextHandle handle, int layer, int64_t begin, int64_t end, float salt) {
    ContextShard& context = shard(handle);
    const Layout& layout = context.shape.layout;
    const int rank = context.map.rank();
    const PagedView view = store_.view(context, layer, 0, layout.local_length(rank, end));
    for (int64_t local = layout.local_length(rank, begin); local < view.num_entries; ++local) {
      const auto expected = static_cast<float>(layout.global_position(rank, local)) + salt;
      ASSERT_EQ(load_element(view.dtype, view.key(local, 0), 7), expected) << local;
      ASSERT_EQ(load_element(view.dtype, view.value(local, 0), 15), -expected) << local;
    }
  }

 private:
  std::unique_ptr<Backend> backend_;
  Stream stream_;
  ShardStore store_;
};

TEST(ShardStore, GrowthTakesWhatTheLeadReckons) {
  Random random(7);
  for (const ContextShape& shape : shapes()) {
    for (int rank = 0; rank < shape.layout.num_ranks; ++rank) {
      Storage storage(shape, rank);
      const ShardMap& map = storage.shard(1).map;
      int64_t length = 0;
      while (length < kMaxTokens) {
        const int64_t end = std::min(kMaxTokens, length + random.between(1, 150));
        const int64_t before = storage.store().pool().used_bytes();
        storage.grow(1, 0, end, 0.0F);
        ASSERT_EQ(storage.store().pool().used_bytes() - before,
                  map.growth_bytes(length, end, /*may_be_shared=*/false))
            << "rank " << rank << " from " << length << " to " << end;
        const ShardMap::Bytes held = map.held_bytes(end);
        ASSERT_EQ(storage.store().pool().used_bytes(), held.tokens + held.summaries);
        length = end;
      }
    }
  }
}

TEST(ShardStore, AForkWritesToItsOwnPages) {
  Random random(9);
  for (const ContextShape& shape : shapes()) {
    for (int rank = 0; rank < shape.layout.num_ranks; ++rank) {
      Storage storage(shape, rank);
      const int64_t length = random.between(1, kMaxTokens / 2);
      storage.grow(1, 0, length, 0.0F);
      const int64_t shared = random.between(0, length);
      const int64_t used = storage.store().pool().used_bytes();
      storage.store().fork(storage.shard(1), 2, shared);
      ASSERT_EQ(storage.store().pool().used_bytes(), used);
      ASSERT_EQ(storage.shard(2).committed(), 0);  // layer 1 is empty
      const int64_t end = random.between(shared + 1, kMaxTokens);
      const int64_t before = storage.store().pool().used_bytes();
      storage.grow(2, 0, end, 0.5F);
      ASSERT_LE(storage.store().pool().used_bytes() - before,
                storage.shard(2).map.growth_bytes(shared, end, /*may_be_shared=*/true));
      storage.expect_tokens(1, 0, 0, length, 0.0F);
      storage.expect_tokens(2, 0, 0, shared, 0.0F);
      storage.expect_tokens(2, 0, shared, end, 0.5F);
      storage.store().remove(storage.shard(1));
      storage.expect_tokens(2, 0, 0, shared, 0.0F);
      storage.store().remove(storage.shard(2));
      ASSERT_EQ(storage.store().pool().used_bytes(), 0);
    }
  }
}

TEST(ShardStore, TruncationGivesPagesBack) {
  Random random(11);
  for (const ContextShape& shape : shapes()) {
    Storage storage(shape, 0);
    storage.grow(1, 0, kMaxTokens, 0.0F);
    const int64_t kept = random.between(0, kMaxTokens);
    storage.store().truncate(storage.shard(1), kept);
    const ShardMap::Bytes held = storage.shard(1).map.held_bytes(kept);
    ASSERT_EQ(storage.store().pool().used_bytes(), held.tokens + held.summaries);
    storage.grow(1, 0, kMaxTokens, 0.25F);
    storage.expect_tokens(1, 0, 0, kept, 0.0F);
    storage.expect_tokens(1, 0, kept, kMaxTokens, 0.25F);
  }
}

}  // namespace
}  // namespace longspan::testing
