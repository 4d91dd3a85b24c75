// The unit of storage: pages of 64 entries, as every stage on every backend sees them. Plain data
// without ownership, which device code includes too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/data_type.h"

namespace longspan {

// Tokens in a page, the unit of storage.
inline constexpr int kPageTokens = 64;

// Entries (tokens, or summaries of them) in pages of 64. A page holds
//   keys [G][64][D] at byte 0, then values [G][64][E] at byte `value_offset_bytes()`.
// A kMean summary has keys only (E = 0); kMinMax keeps minima as keys and maxima as values (E = D).
struct PagedView {
  const std::byte* const* pages = nullptr;  // [ceil(num_entries / 64)]
  int64_t num_entries = 0;
  DataType dtype = DataType::kBFloat16;
  int num_kv_heads = 0;
  int key_dim = 0;
  int value_dim = 0;
  // The allocation in which all pages lie, for backends that address pages by tensor maps; null
  // where it is not known.
  const std::byte* arena = nullptr;
  size_t arena_bytes = 0;

  constexpr size_t value_offset_bytes() const { return element_bytes(key_dim); }
  constexpr size_t page_bytes() const { return element_bytes(key_dim + value_dim); }
  constexpr const std::byte* key(int64_t entry, int kv_head) const {
    return pages[entry / kPageTokens] + row_bytes(entry, kv_head, key_dim);
  }
  constexpr const std::byte* value(int64_t entry, int kv_head) const {
    return pages[entry / kPageTokens] + value_offset_bytes() + row_bytes(entry, kv_head, value_dim);
  }

 private:
  constexpr size_t element_bytes(int dim) const {
    return static_cast<size_t>(num_kv_heads) * kPageTokens * static_cast<size_t>(dim) *
           size_of(dtype);
  }
  constexpr size_t row_bytes(int64_t entry, int kv_head, int dim) const {
    const auto row =
        static_cast<size_t>(kv_head) * kPageTokens + static_cast<size_t>(entry % kPageTokens);
    return row * static_cast<size_t>(dim) * size_of(dtype);
  }
};

// Half-open, in entries of the view at hand.
struct Span {
  int64_t begin = 0;
  int64_t end = 0;
  bool operator==(const Span&) const = default;
};

}  // namespace longspan
