// Ownership: every token has one owner, local numbers count it, and stripes stay together.
#include "worker/layout.h"

#include <gtest/gtest.h>

#include "tests/support/cases.h"

namespace longspan::testing {
namespace {

void expect_consistent(const Layout& layout, int64_t num_tokens) {
  std::vector<int64_t> local(static_cast<size_t>(layout.num_ranks), 0);
  for (int64_t position = 0; position < num_tokens; ++position) {
    const int owner = layout.owner(position);
    ASSERT_GE(owner, 0);
    ASSERT_LT(owner, layout.num_ranks);
    for (int rank = 0; rank < layout.num_ranks; ++rank) {
      ASSERT_EQ(layout.local_length(rank, position), local[static_cast<size_t>(rank)])
          << "rank " << rank << " position " << position;
    }
    int64_t& next = local[static_cast<size_t>(owner)];
    ASSERT_EQ(layout.global_position(owner, next), position);
    const int64_t stripe = next / layout.stripe_tokens;
    ASSERT_EQ(layout.global_stripe(owner, stripe), position / layout.stripe_tokens);
    ASSERT_EQ(layout.stripe_owner(position / layout.stripe_tokens), owner);
    ASSERT_LT(position / layout.stripe_tokens, layout.num_stripes());
    ASSERT_EQ(layout.stripe_end(position) % layout.stripe_tokens, 0);
    ASSERT_EQ(layout.owner(layout.stripe_end(position) - 1), owner);
    ASSERT_GT(layout.stripe_end(position), position);
    ++next;
  }
}

TEST(Layout, EveryTokenHasOneOwner) {
  Random random(1);
  for (const LayoutKind kind :
       {LayoutKind::kBlockCyclic, LayoutKind::kContiguous, LayoutKind::kZigzag}) {
    for (const int ranks : {1, 2, 3, 4, 8}) {
      const int64_t max_tokens = random.between(1, 5000);
      const int64_t alignment = int64_t{64} << random.between(0, 2);
      const int64_t stripe = kind == LayoutKind::kBlockCyclic && random.chance(0.5)
                                 ? alignment * random.between(1, 3)
                                 : 0;
      const auto layout = Layout::make(kind, ranks, stripe, max_tokens, alignment);
      ASSERT_TRUE(layout.ok()) << layout.status();
      EXPECT_EQ(layout->stripe_tokens % alignment, 0);
      expect_consistent(*layout, max_tokens);
    }
  }
}

TEST(Layout, ChoosesStripes) {
  EXPECT_EQ(Layout::make(LayoutKind::kBlockCyclic, 4, 0, 1 << 20, 64)->stripe_tokens, 1024);
  EXPECT_EQ(Layout::make(LayoutKind::kBlockCyclic, 4, 0, 1 << 20, 4096)->stripe_tokens, 4096);
  EXPECT_EQ(Layout::make(LayoutKind::kContiguous, 3, 0, 1000, 64)->stripe_tokens, 384);
  EXPECT_EQ(Layout::make(LayoutKind::kZigzag, 2, 0, 1000, 64)->stripe_tokens, 256);
}

TEST(Layout, RefusesWhatCutsABlockOrDoesNotHold) {
  const auto refused = [](const StatusOr<Layout>& layout) {
    return layout.status().code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused(Layout::make(LayoutKind::kBlockCyclic, 2, 96, 1000, 64)));
  EXPECT_TRUE(refused(Layout::make(LayoutKind::kBlockCyclic, 2, -64, 1000, 64)));
  EXPECT_TRUE(refused(Layout::make(LayoutKind::kBlockCyclic, 0, 64, 1000, 64)));
  EXPECT_TRUE(refused(Layout::make(LayoutKind::kBlockCyclic, 2, 64, 0, 64)));
  EXPECT_TRUE(refused(Layout::make(LayoutKind::kContiguous, 2, 448, 1000, 64)));
  EXPECT_TRUE(refused(Layout::make(LayoutKind::kZigzag, 2, 64, int64_t{1} << 60, 64)));
}

}  // namespace
}  // namespace longspan::testing
