// Selection as pure functions: the order of candidates, what is forced, and unions of spans.
#include "worker/selection.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "tests/support/cases.h"
#include "tests/support/methods.h"

namespace longspan::testing {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Candidate {
  float score;
  int64_t id;
};

bool in_order(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

// The global best are among the local best, whatever the split; scores with many ties and
// infinities.
TEST(MergeCandidates, IsTheBestOfAll) {
  Random random(31);
  for (int round = 0; round < 500; ++round) {
    const auto ranks = static_cast<size_t>(random.between(1, 8));
    const int64_t capacity = random.between(1, 9);
    const int64_t k = random.between(0, capacity);
    std::vector<std::vector<Candidate>> by_rank(ranks);
    std::vector<Candidate> all;
    const int64_t count = random.between(0, 40);
    for (int64_t id = 0; id < count; ++id) {
      float score = static_cast<float>(random.between(-2, 2));
      score = random.chance(0.1) ? kLowest : score;
      const Candidate candidate{score, id};
      all.push_back(candidate);
      by_rank[static_cast<size_t>(random.between(0, std::ssize(by_rank) - 1))].push_back(candidate);
    }
    std::vector<std::vector<float>> scores(ranks);
    std::vector<std::vector<int64_t>> ids(ranks);
    std::vector<const float*> score_lists;
    std::vector<const int64_t*> id_lists;
    for (size_t rank = 0; rank < ranks; ++rank) {
      std::sort(by_rank[rank].begin(), by_rank[rank].end(), in_order);
      scores[rank].assign(static_cast<size_t>(capacity), kLowest);
      ids[rank].assign(static_cast<size_t>(capacity), -1);
      for (size_t i = 0; i < std::min<size_t>(by_rank[rank].size(), static_cast<size_t>(k)); ++i) {
        scores[rank][i] = by_rank[rank][i].score;
        ids[rank][i] = by_rank[rank][i].id;
      }
      score_lists.push_back(scores[rank].data());
      id_lists.push_back(ids[rank].data());
    }
    std::vector<float> best(static_cast<size_t>(capacity), 7.0F);
    std::vector<int64_t> best_ids(static_cast<size_t>(capacity), 7);
    merge_candidates({static_cast<int>(ranks), score_lists.data(), id_lists.data()},
                     capacity,
                     k,
                     best.data(),
                     best_ids.data());
    std::sort(all.begin(), all.end(), in_order);
    for (int64_t place = 0; place < capacity; ++place) {
      const auto index = static_cast<size_t>(place);
      const bool is_used = place < std::min<int64_t>(k, count);
      ASSERT_EQ(best_ids[index], is_used ? all[index].id : -1);
      ASSERT_EQ(best[index], is_used ? all[index].score : kLowest);
    }
  }
}

TEST(MergeCandidates, NotANumberIsTheLowest) {
  const std::vector<float> first{std::nanf("")};
  const std::vector<int64_t> first_ids{0};
  const std::vector<float> second{-1e30F};
  const std::vector<int64_t> second_ids{5};
  const float* scores[] = {first.data(), second.data()};
  const int64_t* ids[] = {first_ids.data(), second_ids.data()};
  float best = 0;
  int64_t best_id = 0;
  merge_candidates({2, scores, ids}, 1, 1, &best, &best_id);
  EXPECT_EQ(best_id, 5);
}

TEST(BlockChoice, ForcedBlocksAreNoCandidates) {
  Random random(33);
  for (int round = 0; round < 500; ++round) {
    Branch branch = quest_method(16, 4).branches[0];
    branch.selection.forced_first_blocks = static_cast<int>(random.between(0, 3));
    branch.selection.forced_last_blocks = static_cast<int>(random.between(1, 3));
    branch.selection.forced_within_budget = random.chance(0.5);
    branch.budget.decode.value = static_cast<double>(random.between(1, 8));
    const int64_t position = random.between(0, 300);
    const int64_t own = position / 16;
    int64_t forced = 0;
    int64_t candidates = 0;
    const BlockChoice choice = block_choice(branch, Phase::kDecode, position);
    for (int64_t block = 0; block <= own; ++block) {
      const bool is_forced = block < branch.selection.forced_first_blocks ||
                             block > own - branch.selection.forced_last_blocks;
      (is_forced ? forced : candidates) += 1;
      const bool is_candidate = block >= choice.candidates.begin && block < choice.candidates.end;
      ASSERT_NE(is_candidate, is_forced) << "block " << block << " of position " << position;
    }
    const auto budget = static_cast<int64_t>(branch.budget.decode.value);
    const int64_t scored = branch.selection.forced_within_budget
                               ? std::max<int64_t>(std::min(budget, own + 1) - forced, 0)
                               : std::min(budget, own + 1);
    ASSERT_EQ(choice.k, std::min(scored, candidates));
  }
}

TEST(Coalesce, IsTheUnion) {
  Random random(35);
  for (int round = 0; round < 500; ++round) {
    std::vector<Span> spans{{1000, 1001}};  // before `first`: left alone
    std::vector<bool> members(60, false);
    for (int64_t i = random.between(0, 8); i > 0; --i) {
      const int64_t begin = random.between(0, 50);
      const int64_t end = begin + random.between(0, 9);
      spans.push_back({begin, end});
      std::fill(members.begin() + begin, members.begin() + end, true);
    }
    coalesce(spans, 1);
    ASSERT_EQ(spans[0], (Span{1000, 1001}));
    std::vector<bool> joined(60, false);
    int64_t last = -1;
    for (size_t i = 1; i < spans.size(); ++i) {
      ASSERT_GT(spans[i].begin, last);  // neither overlaps nor touches
      ASSERT_LT(spans[i].begin, spans[i].end);
      last = spans[i].end;
      std::fill(joined.begin() + spans[i].begin, joined.begin() + spans[i].end, true);
    }
    ASSERT_EQ(joined, members);
  }
}

}  // namespace
}  // namespace longspan::testing
