#include "worker/layout.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

#include "base/checked.h"
#include "kernels/method.h"

namespace longspan {
namespace {

// A stripe is long enough that the pages and seams of its ends weigh little, and short enough that
// recent and first tokens spread over the ranks.
constexpr int64_t kDefaultStripePages = 16;

int64_t clamped(int64_t value, int64_t limit) { return std::clamp<int64_t>(value, 0, limit); }

// What a layout without a given stripe takes: its runs are equal parts of max_tokens.
int64_t chosen_stripe(LayoutKind kind, int num_ranks, int64_t max_tokens, int64_t alignment) {
  if (kind == LayoutKind::kBlockCyclic) {
    return std::max(alignment, kDefaultStripePages * kPageTokens);
  }
  const int64_t runs = kind == LayoutKind::kZigzag ? 2 * int64_t{num_ranks} : num_ranks;
  return divide_up(divide_up(max_tokens, runs), alignment) * alignment;
}

}  // namespace

StatusOr<Layout> Layout::make(
    LayoutKind kind, int num_ranks, int64_t stripe_tokens, int64_t max_tokens, int64_t alignment) {
  if (num_ranks < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("layout.num_ranks: must be at least 1, got ", num_ranks));
  }
  if (max_tokens < 1 || max_tokens > kMaxContextTokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_tokens: must be between 1 and ", kMaxContextTokens, ", got ", max_tokens));
  }
  if (alignment < 1 || alignment > kMaxContextTokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "layout: blocks of the methods have no common multiple below ", kMaxContextTokens));
  }
  if (stripe_tokens < 0 || stripe_tokens > kMaxContextTokens || stripe_tokens % alignment != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("layout.stripe_tokens: must be a multiple of ",
                     alignment,
                     ", the page and every block of the methods, got ",
                     stripe_tokens));
  }
  const int64_t needed = chosen_stripe(kind, num_ranks, max_tokens, alignment);
  if (kind != LayoutKind::kBlockCyclic && stripe_tokens != 0 && stripe_tokens < needed) {
    return absl::InvalidArgumentError(absl::StrCat("layout.stripe_tokens: runs of ",
                                                   stripe_tokens,
                                                   " tokens do not hold max_tokens = ",
                                                   max_tokens,
                                                   ", which needs ",
                                                   needed));
  }
  return Layout{kind, num_ranks, stripe_tokens != 0 ? stripe_tokens : needed};
}

int Layout::owner(int64_t position) const { return stripe_owner(position / stripe_tokens); }

int64_t Layout::num_stripes() const {
  switch (kind) {
    case LayoutKind::kBlockCyclic:
      return kMaxContextTokens / stripe_tokens;
    case LayoutKind::kContiguous:
      return num_ranks;
    case LayoutKind::kZigzag:
      return 2 * int64_t{num_ranks};
  }
  return 0;
}

int Layout::stripe_owner(int64_t stripe) const {
  switch (kind) {
    case LayoutKind::kBlockCyclic:
      return static_cast<int>(stripe % num_ranks);
    case LayoutKind::kContiguous:
      return static_cast<int>(std::min<int64_t>(stripe, num_ranks - 1));
    case LayoutKind::kZigzag:
      return static_cast<int>(
          stripe < num_ranks ? stripe : std::max<int64_t>(2 * num_ranks - 1 - stripe, 0));
  }
  return 0;
}

int64_t Layout::global_stripe(int rank, int64_t local_stripe) const {
  switch (kind) {
    case LayoutKind::kBlockCyclic:
      return local_stripe * num_ranks + rank;
    case LayoutKind::kContiguous:
      return local_stripe + rank;
    case LayoutKind::kZigzag:
      return local_stripe == 0 ? rank : 2 * num_ranks - 2 - rank + local_stripe;
  }
  return 0;
}

int64_t Layout::local_length(int rank, int64_t num_tokens) const {
  switch (kind) {
    case LayoutKind::kBlockCyclic: {
      const int64_t round = stripe_tokens * num_ranks;
      return num_tokens / round * stripe_tokens +
             clamped(num_tokens % round - rank * stripe_tokens, stripe_tokens);
    }
    case LayoutKind::kContiguous:
      return clamped(num_tokens - rank * stripe_tokens, stripe_tokens);
    case LayoutKind::kZigzag:
      return clamped(num_tokens - rank * stripe_tokens, stripe_tokens) +
             clamped(num_tokens - (2 * num_ranks - 1 - rank) * stripe_tokens, stripe_tokens);
  }
  return 0;
}

int64_t Layout::global_position(int rank, int64_t local) const {
  return global_stripe(rank, local / stripe_tokens) * stripe_tokens + local % stripe_tokens;
}

int64_t Layout::stripe_end(int64_t position) const {
  return (position / stripe_tokens + 1) * stripe_tokens;
}

}  // namespace longspan
