#include "worker/selection.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/status.h"
#include "kernels/anchors.h"

namespace longspan {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
// Ranks of a group; a group has at most this many (worker/group.cc).
constexpr size_t kMaxLists = 64;

float comparable(float score) { return std::isnan(score) ? kLowest : score; }

bool before(float score, int64_t id, float other_score, int64_t other_id) {
  return score != other_score ? score > other_score : id < other_id;
}

}  // namespace

BlockChoice block_choice(const Branch& branch, Phase phase, int64_t position) {
  const SelectionSpec& selection = branch.selection;
  const int64_t visible = position / selection.block_tokens + 1;
  BlockChoice choice;
  choice.forced_first = std::min<int64_t>(selection.forced_first_blocks, visible);
  choice.forced_last = std::max<int64_t>(visible - selection.forced_last_blocks, 0);
  choice.candidates = {choice.forced_first, std::max(choice.forced_first, choice.forced_last)};
  const int64_t num_candidates = choice.candidates.end - choice.candidates.begin;
  int64_t budget = branch.budget.amount(phase).blocks(visible, selection.block_tokens);
  if (selection.forced_within_budget) {
    budget = std::max<int64_t>(budget - (visible - num_candidates), 0);
  }
  choice.k = std::min(budget, num_candidates);
  return choice;
}

int64_t span_budget(const Branch& branch, Phase phase, int64_t num_anchors) {
  return std::min(branch.budget.amount(phase).blocks(num_anchors, 1), num_anchors);
}

Span block_tokens(const Branch& branch, int64_t block, int64_t position) {
  const int64_t begin = block * branch.selection.block_tokens;
  return {begin, std::min(begin + branch.selection.block_tokens, position + 1)};
}

void append_static_spans(const Branch& branch, int64_t position, std::vector<Span>& spans) {
  const int64_t visible = position + 1;
  const SelectionSpec& selection = branch.selection;
  if (selection.kind == SelectionKind::kAll) {
    spans.push_back({0, visible});
    return;
  }
  const int64_t window = std::min(static_window(branch), visible);
  spans.push_back({visible - window, visible});
  spans.push_back({0, std::min(branch.mask.sink_tokens, visible)});
  if (selection.kind == SelectionKind::kTopK && !selection.spans) {
    const int64_t own = position / selection.block_tokens;
    const int64_t last = std::max<int64_t>(own + 1 - selection.forced_last_blocks, 0);
    spans.push_back(
        {0, std::min(int64_t{selection.forced_first_blocks} * selection.block_tokens, visible)});
    spans.push_back({last * selection.block_tokens, visible});
  }
}

void coalesce(std::vector<Span>& spans, size_t first) {
  const auto begin = spans.begin() + static_cast<std::ptrdiff_t>(first);
  std::sort(begin, spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  auto kept = begin;  // one behind the last span that stays
  for (auto span = begin; span != spans.end(); ++span) {
    if (span->begin >= span->end) {
      continue;
    }
    if (kept != begin && span->begin <= (kept - 1)->end) {
      (kept - 1)->end = std::max((kept - 1)->end, span->end);
    } else {
      *kept++ = *span;
    }
  }
  spans.erase(kept, spans.end());
}

int64_t total_length(const std::vector<Span>& spans) {
  int64_t tokens = 0;
  for (const Span& span : spans) {
    tokens += span.end - span.begin;
  }
  return tokens;
}

Span to_local(const Layout& layout, int rank, Span span) {
  if (layout.num_ranks == 1) {
    return span;
  }
  return {layout.local_length(rank, span.begin), layout.local_length(rank, span.end)};
}

void merge_candidates(
    const CandidateLists& lists, int64_t capacity, int64_t k, float* out_scores, int64_t* out_ids) {
  std::array<int64_t, kMaxLists> heads{};
  LONGSPAN_CHECK(static_cast<size_t>(lists.num_lists) <= kMaxLists);
  for (int64_t place = 0; place < capacity; ++place) {
    float best_score = kLowest;
    int64_t best_id = -1;
    size_t best_list = 0;
    for (size_t list = 0; place < k && list < static_cast<size_t>(lists.num_lists); ++list) {
      const int64_t head = heads[list];
      if (head >= capacity || lists.ids[list][head] < 0) {
        continue;
      }
      const float score = comparable(lists.scores[list][head]);
      const int64_t id = lists.ids[list][head];
      if (best_id < 0 || before(score, id, best_score, best_id)) {
        best_score = score;
        best_id = id;
        best_list = list;
      }
    }
    if (best_id >= 0) {
      ++heads[best_list];
    }
    out_scores[place] = best_score;
    out_ids[place] = best_id;
  }
}

}  // namespace longspan
