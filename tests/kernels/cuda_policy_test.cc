// How the CUDA backend cuts its work: for any shape, every piece is in some block's share and the
// scratch memory stays bounded.
#include <bit>

#include "gtest/gtest.h"

#include "kernels/cuda/policy.h"

namespace longspan::cuda {
namespace {

DeviceInfo hopper() {
  DeviceInfo device;
  device.compute_major = 9;
  device.num_sms = 132;
  return device;
}

TEST(AttendSplits, FillTheDeviceWithFewLongRows) {
  EXPECT_EQ(attend_splits(1, int64_t{1} << 20, hopper()), 4 * 132);
  EXPECT_EQ(attend_splits(32, int64_t{1} << 20, hopper()), 17);
}

TEST(AttendSplits, AreOneWithManyRowsOrFewTokens) {
  EXPECT_EQ(attend_splits(0, 0, hopper()), 1);
  EXPECT_EQ(attend_splits(1, 0, hopper()), 1);
  EXPECT_EQ(attend_splits(1, 2047, hopper()), 1);
  EXPECT_EQ(attend_splits(1, 2048, hopper()), 2);
  EXPECT_EQ(attend_splits(100000, int64_t{1} << 20, hopper()), 1);
}

TEST(AttendKernels, DecodeTakesWhatFitsInATile) {
  EXPECT_TRUE(prefers_decode(1, 4));
  EXPECT_TRUE(prefers_decode(16, 4));
  EXPECT_FALSE(prefers_decode(17, 4));
}

TEST(AttendTiles, SuitTheListsAndTheHeads) {
  const TileShape long_heads{.key_dim = 128, .value_dim = 128, .group = 4};
  EXPECT_EQ(attend_tile_rows(long_heads, 1), 64);
  EXPECT_EQ(attend_tile_rows(long_heads, 64), 64);
  EXPECT_EQ(attend_tile_rows(long_heads, 128), 128);
  EXPECT_EQ(attend_tile_rows(long_heads, 1 << 20), 128);
  const TileShape short_heads{.key_dim = 64, .value_dim = 64, .group = 4};
  EXPECT_EQ(attend_tile_rows(short_heads, 1), 64);
  EXPECT_EQ(attend_tile_rows(short_heads, 128), 128);
  EXPECT_EQ(attend_tile_rows(short_heads, 1 << 20), 192);
}

TEST(AttendTiles, LargestHaveRoomForTheirListsOnly) {
  const TileShape single_heads{.key_dim = 64, .value_dim = 64, .group = 1};
  EXPECT_EQ(attend_tile_rows(single_heads, 1 << 20), 128);
  const TileShape head_lists{.key_dim = 64, .value_dim = 64, .group = 4, .lists_per_token = 4};
  EXPECT_EQ(attend_tile_rows(head_lists, 1 << 20), 128);
}

TEST(AttendKernels, SectionsOfHeadsStayInL2) {
  DeviceInfo device = hopper();
  device.l2_bytes = size_t{48} << 20;
  EXPECT_EQ(section_heads(8, int64_t{16} << 20, device), 2);
  EXPECT_EQ(section_heads(8, int64_t{1} << 30, device), 1);
  EXPECT_EQ(section_heads(8, int64_t{5} << 20, device), 4);  // not 6 and then 2
  EXPECT_EQ(section_heads(8, 1000, device), 8);
  EXPECT_EQ(section_heads(8, 0, device), 8);
}

TEST(SearchGrid, HasAQueueWithRoomForTheBestAndForWhatArrives) {
  for (const int64_t max_k : {0, 1, 16, 256, 1000, 1024, 1025, 20000, 1000000}) {
    for (const int64_t num_lists : {0, 1, 32, 500000}) {
      const SearchGrid grid = search_grid(num_lists, 100000, max_k, hopper());
      EXPECT_TRUE(std::has_single_bit(static_cast<uint64_t>(grid.queue_capacity)));
      EXPECT_GE(grid.queue_capacity, max_k + kSearchThreads);
      EXPECT_EQ(grid.shared_queue, max_k <= 1024);
      EXPECT_LE(grid.num_blocks, num_lists * grid.num_splits);
      EXPECT_EQ(grid.num_blocks > 0, num_lists > 0);
      if (!grid.shared_queue) {
        EXPECT_LE(grid.num_blocks * grid.queue_capacity * 8, int64_t{256} << 20);
      }
    }
  }
}

TEST(SearchGrid, SplitsFewLongLists) {
  EXPECT_EQ(search_grid(8, 16384, 16, hopper()).num_splits, 32);
  EXPECT_EQ(search_grid(8, 1000, 16, hopper()).num_splits, 1);
  EXPECT_EQ(search_grid(100000, 16384, 16, hopper()).num_splits, 1);
}

}  // namespace
}  // namespace longspan::cuda
