// Who owns which token, as pure functions of (layout, rank): nothing is stored, so fork, truncate
// and resize are metadata changes. Ownership is monotone: a rank's tokens in global order are its
// local tokens 0, 1, 2, …
#pragma once

#include <cstdint>

#include "base/status.h"

namespace longspan {

// Beyond any use, and far from where the arithmetic of positions would overflow.
inline constexpr int64_t kMaxContextTokens = int64_t{1} << 40;

enum class LayoutKind : uint8_t { kBlockCyclic, kContiguous, kZigzag };

struct Layout {
  LayoutKind kind = LayoutKind::kBlockCyclic;
  int num_ranks = 1;
  // Tokens that stay together: the stripe of kBlockCyclic, the run of kContiguous (max_tokens / P)
  // and kZigzag (max_tokens / 2P), rounded up to the alignment of the context's methods.
  int64_t stripe_tokens = 0;

  // stripe_tokens 0: chosen here. INVALID_ARGUMENT when a given stripe is no multiple of
  // `alignment`.
  static StatusOr<Layout> make(
      LayoutKind kind, int num_ranks, int64_t stripe_tokens, int64_t max_tokens, int64_t alignment);

  int owner(int64_t position) const;
  // Tokens of [0, num_tokens) that `rank` owns: also the local index of the first owned token at or
  // after num_tokens.
  int64_t local_length(int rank, int64_t num_tokens) const;
  // Global position of a local token.
  int64_t global_position(int rank, int64_t local) const;
  // The first position after `position` that another stripe holds.
  int64_t stripe_end(int64_t position) const;

  // Stripe i of the context holds tokens [i * stripe_tokens, (i + 1) * stripe_tokens).
  int64_t num_stripes() const;
  int stripe_owner(int64_t stripe) const;
  // The number in the context of a rank's own stripe.
  int64_t global_stripe(int rank, int64_t local_stripe) const;
};

}  // namespace longspan
