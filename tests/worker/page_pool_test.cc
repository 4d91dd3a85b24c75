// Pages: capacity, sharing, and memory that goes back.
#include "worker/page_pool.h"

#include <cstring>
#include <map>

#include <gtest/gtest.h>

#include "tests/support/cases.h"

namespace longspan::testing {
namespace {

TEST(PagePool, ChargesWholeCacheLines) {
  EXPECT_EQ(PagePool::charge(1), 64);
  EXPECT_EQ(PagePool::charge(64), 64);
  EXPECT_EQ(PagePool::charge(65), 128);
}

TEST(PagePool, RefusesBeyondItsCapacity) {
  PagePool pool(1000);
  const auto page = pool.allocate(960, {});
  ASSERT_TRUE(page.ok());
  EXPECT_EQ(pool.used_bytes(), 960);
  EXPECT_EQ(pool.allocate(41, {}).status().code(), absl::StatusCode::kResourceExhausted);
  pool.release(*page);
  EXPECT_EQ(pool.used_bytes(), 0);
  EXPECT_TRUE(pool.allocate(41, {}).ok());
}

TEST(PagePool, SharedPagesLiveUntilTheLastHolder) {
  PagePool pool(1 << 20);
  const PageId page = *pool.allocate(100, {7, 1, 2, 64});
  EXPECT_FALSE(pool.is_shared(page));
  pool.add_reference(page);
  EXPECT_TRUE(pool.is_shared(page));
  pool.release(page);
  EXPECT_FALSE(pool.is_shared(page));
  EXPECT_EQ(pool.used_bytes(), 128);
  EXPECT_EQ(pool.tag(page), (PageTag{7, 1, 2, 64}));
  pool.release(page);
  EXPECT_EQ(pool.used_bytes(), 0);
  EXPECT_EQ(pool.num_slabs(), 0);
}

// Every live page keeps its own bytes through a random life of two sizes.
TEST(PagePool, PagesDoNotOverlap) {
  Random random(5);
  PagePool pool(int64_t{64} << 20);
  std::map<PageId, std::byte> live;
  for (int step = 0; step < 3000; ++step) {
    if (live.empty() || random.chance(0.6)) {
      const size_t bytes = random.chance(0.5) ? 49152 : 3072;
      const StatusOr<PageId> page = pool.allocate(bytes, {});
      if (!page.ok()) {
        ASSERT_EQ(page.status().code(), absl::StatusCode::kResourceExhausted);
        continue;
      }
      const auto fill = static_cast<std::byte>(random.between(0, 255));
      ASSERT_EQ(reinterpret_cast<uintptr_t>(pool.data(*page)) % 64, 0U);
      std::memset(pool.data(*page), static_cast<int>(fill), bytes);
      ASSERT_TRUE(live.emplace(*page, fill).second);
    } else {
      const auto page = std::next(live.begin(), random.between(0, std::ssize(live) - 1));
      const std::byte* data = pool.data(page->first);
      for (size_t i = 0; i < pool.bytes(page->first); i += 511) {
        ASSERT_EQ(data[i], page->second);
      }
      pool.release(page->first);
      live.erase(page);
    }
  }
  for (const auto& [page, fill] : live) {
    pool.release(page);
  }
  EXPECT_EQ(pool.used_bytes(), 0);
  EXPECT_EQ(pool.num_slabs(), 0);
}

}  // namespace
}  // namespace longspan::testing
