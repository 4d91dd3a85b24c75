// Check and return macros over absl::Status, which Debian's Abseil (20220623) does not have yet.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace longspan {

using absl::Status;
using absl::StatusOr;

}  // namespace longspan

#define LONGSPAN_CONCAT_INNER(a, b) a##b
#define LONGSPAN_CONCAT(a, b) LONGSPAN_CONCAT_INNER(a, b)

// Returns from the calling function when `expression` (a Status) is not OK.
#define LONGSPAN_RETURN_IF_ERROR(expression)                  \
  do {                                                        \
    if (absl::Status status_ = (expression); !status_.ok()) { \
      return status_;                                         \
    }                                                         \
  } while (false)

// Declares or assigns `target` from `expression` (a StatusOr), or returns its status.
// NOLINTBEGIN(bugprone-macro-parentheses): a declared name cannot be parenthesised.
#define LONGSPAN_ASSIGN_OR_RETURN(target, expression) \
  LONGSPAN_ASSIGN_OR_RETURN_INNER(LONGSPAN_CONCAT(status_or_, __LINE__), target, expression)
#define LONGSPAN_ASSIGN_OR_RETURN_INNER(temporary, target, expression) \
  auto temporary = (expression);                                       \
  if (!temporary.ok()) {                                               \
    return std::move(temporary).status();                              \
  }                                                                    \
  target = *std::move(temporary)
// NOLINTEND(bugprone-macro-parentheses)

// For programmer errors only: prints the condition and aborts, in release builds too.
#define LONGSPAN_CHECK(condition)                                                        \
  do {                                                                                   \
    if (!(condition)) [[unlikely]] {                                                     \
      std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)
