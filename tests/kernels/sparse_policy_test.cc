// How the sparse decode step is cut: for any shape it takes, everything has its own place in shared
// memory, and clusters fill the device without being too small to choose the best.
#include "kernels/cuda/sparse_policy.h"

#include <vector>

#include "gtest/gtest.h"

namespace longspan::cuda {
namespace {

DeviceInfo hopper() {
  DeviceInfo device;
  device.compute_major = 9;
  device.num_sms = 132;
  device.shared_memory_per_block = 232448;
  return device;
}

SparseShape shape_of(int query_heads, int kv_heads, int64_t num_tokens, int64_t k) {
  SparseShape shape;
  shape.search.num_rows = 1;
  shape.search.num_query_heads = query_heads;
  shape.search.num_kv_heads = kv_heads;
  shape.search.dim = 128;
  shape.search.num_entries = num_tokens / 64;
  shape.search.max_k = k;
  shape.search.query_form = QueryForm::kGroupMean;
  return shape;
}

TEST(SparsePlan, ClustersAreAsLargeAsTheDeviceCanPlaceAtOnce) {
  const SparseShape four_lists = shape_of(64, 4, int64_t{1} << 20, 64);
  EXPECT_EQ(plan_sparse_decode(four_lists, hopper(), 16).cluster_size, 16);
  EXPECT_EQ(plan_sparse_decode(four_lists, hopper(), 8).cluster_size, 8);
  const SparseShape eight_lists = shape_of(32, 8, int64_t{1} << 20, 64);
  EXPECT_EQ(plan_sparse_decode(eight_lists, hopper(), 16).cluster_size, 8);
  EXPECT_EQ(plan_sparse_decode(eight_lists, hopper(), 4).cluster_size, 4);
}

TEST(SparsePlan, ManyRowsHaveSmallClustersThatStillTellTheBest) {
  SparseShape shape = shape_of(32, 8, int64_t{1} << 20, 64);
  shape.search.num_rows = 64;
  EXPECT_EQ(plan_sparse_decode(shape, hopper(), 16).cluster_size, 2);
  shape.search.max_k = 256;
  EXPECT_EQ(plan_sparse_decode(shape, hopper(), 16).cluster_size, 8);
}

TEST(SparsePlan, DeclinesWhatTheKernelDoesNotDo) {
  const SparseShape good = shape_of(32, 8, 100000, 64);
  EXPECT_TRUE(plan_sparse_decode(good, hopper(), 16).supported);
  SparseShape shape = good;
  shape.search.max_k = 257;
  EXPECT_FALSE(plan_sparse_decode(shape, hopper(), 16).supported);
  shape = good;
  shape.search.dim = 192;
  EXPECT_FALSE(plan_sparse_decode(shape, hopper(), 16).supported);
  shape = good;
  shape.search.score = ScoreForm::kBound;
  EXPECT_FALSE(plan_sparse_decode(shape, hopper(), 16).supported);
  shape = good;
  shape.search.join_all_heads = true;
  EXPECT_FALSE(plan_sparse_decode(shape, hopper(), 16).supported);
  shape = good;
  shape.forced.window_tokens = int64_t{1} << 20;
  EXPECT_FALSE(plan_sparse_decode(shape, hopper(), 16).supported);
  DeviceInfo other = hopper();
  other.compute_major = 10;
  EXPECT_FALSE(plan_sparse_decode(good, other, 16).supported);
}

TEST(SparsePlan, LaysOutSharedMemoryInOrderAndWithinTheLimit) {
  for (const int dim : {64, 128}) {
    for (const int query_heads : {8, 32, 128}) {
      for (const int64_t tokens : {int64_t{0}, int64_t{1} << 17, int64_t{10} << 20}) {
        for (const int64_t k : {0, 64, 256}) {
          SparseShape shape = shape_of(query_heads, 8, tokens, k);
          shape.search.dim = dim;
          const SparsePlan plan = plan_sparse_decode(shape, hopper(), 16);
          ASSERT_TRUE(plan.supported);
          const SparseLayout& layout = plan.layout;
          const std::vector<int> offsets = {plan.num_stages * 64 * dim * 2,
                                            layout.segments,
                                            layout.keys,
                                            layout.maxima,
                                            layout.survivors,
                                            layout.list,
                                            layout.ranks,
                                            layout.query,
                                            layout.weights,
                                            layout.slice_rows,
                                            layout.statistics,
                                            layout.shares,
                                            layout.sums,
                                            layout.items,
                                            layout.barriers,
                                            layout.state,
                                            layout.end};
          for (size_t i = 1; i < offsets.size(); ++i) {
            EXPECT_LE(offsets[i - 1], offsets[i]) << i;
          }
          EXPECT_GE(layout.keys - layout.segments, plan.cluster_size * plan.segment_places * 8);
          EXPECT_GE(layout.maxima - layout.keys, plan.key_places * 4);
          EXPECT_GE(int64_t{plan.key_places} * plan.cluster_size, tokens / 64);
          EXPECT_EQ(plan.shared_bytes, static_cast<size_t>(layout.end));
          EXPECT_LE(plan.shared_bytes, hopper().shared_memory_per_block);
        }
      }
    }
  }
}

TEST(ForcedTokens, CountTheirPages) {
  EXPECT_EQ((ForcedTokens{0, 0, 0, 0}).max_pages(), 0);
  EXPECT_EQ((ForcedTokens{1, 2, 0, 0}).max_pages(), 3);
  // A window that does not begin with a page reaches into one page more.
  EXPECT_EQ((ForcedTokens{0, 1, 64, 0}).max_pages(), 2);
  EXPECT_EQ((ForcedTokens{0, 1, 65, 4}).max_pages(), 4);
}

}  // namespace
}  // namespace longspan::cuda
