// A tile of query rows against pages: how the rows are numbered, and which pages each of its span
// lists sees. Plain functions, for the device and for tests on the host.
//
// A tile holds `tokens` query tokens times the `group` query heads of one KV head; its row
// t * group + i is head i of token t. A list is what a row attends to: one a token, or one a row
// where every query head has its own.
#pragma once

#include <cstdint>

#include "kernels/page.h"

#ifdef __CUDACC__
#define LONGSPAN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LONGSPAN_HOST_DEVICE inline
#endif

namespace longspan::cuda {

// A page number beyond all pages.
inline constexpr int32_t kNoPage = INT32_MAX;

// Where one list of a tile has got to. Spans are ascending and disjoint, tokens below 2^31 - 64.
struct ListCursor {
  int32_t begin = INT32_MAX;  // the current span; begin = INT32_MAX: no more
  int32_t end = INT32_MAX;
  int32_t next = 0;  // of the tile's spans
  int32_t last = 0;

  LONGSPAN_HOST_DEVICE void advance(const Span* spans) {
    do {
      const bool more = next < last;
      begin = more ? static_cast<int32_t>(spans[next].begin) : INT32_MAX;
      end = more ? static_cast<int32_t>(spans[next].end) : INT32_MAX;
      ++next;
    } while (begin >= end && begin != INT32_MAX);
  }

  // The first page at or after `page` that the list sees.
  LONGSPAN_HOST_DEVICE int32_t page_from(int32_t page) const {
    const int32_t own = begin / kPageTokens;
    return begin == INT32_MAX ? kNoPage : (own > page ? own : page);
  }

  // Whole pages from `page`, which the list sees, that the current span covers.
  LONGSPAN_HOST_DEVICE int32_t whole_pages_from(int32_t page) const {
    return begin <= page * kPageTokens ? end / kPageTokens - page : 0;
  }

  // Drops what ends at or before `token`.
  LONGSPAN_HOST_DEVICE void drop_until(const Span* spans, int32_t token) {
    if (end <= token) {
      advance(spans);
    }
  }

  // The tokens of `page` that the list sees, as bits; drops them.
  LONGSPAN_HOST_DEVICE uint64_t take_columns(const Span* spans, int32_t page) {
    const int32_t first = page * kPageTokens;
    uint64_t columns = 0;
    while (begin < first + kPageTokens) {
      const int32_t from = begin > first ? begin - first : 0;
      const int32_t to = end < first + kPageTokens ? end - first : kPageTokens;
      columns |= (~uint64_t{0} >> (kPageTokens - (to - from))) << from;
      if (end > first + kPageTokens) {
        break;
      }
      advance(spans);
    }
    return columns;
  }
};

// The order in which work items (tile, KV head) are dealt out: the heads in sections whose keys and
// values fit in L2 together, in a section the last tile first (in causal attention the longest),
// and the heads of a tile one after another.
struct TileOrder {
  int32_t num_tiles = 0;
  int32_t num_kv_heads = 0;
  int32_t section_heads = 1;

  struct Item {
    int32_t tile;
    int32_t kv_head;
  };

  LONGSPAN_HOST_DEVICE int32_t num_items() const { return num_tiles * num_kv_heads; }
  LONGSPAN_HOST_DEVICE Item item(int32_t index) const {
    const int32_t section = index / (num_tiles * section_heads);
    const int32_t first_head = section * section_heads;
    const int32_t rest = index - first_head * num_tiles;
    const int32_t left = num_kv_heads - first_head;
    const int32_t heads = left < section_heads ? left : section_heads;
    return {num_tiles - 1 - rest / heads, first_head + rest % heads};
  }
};

}  // namespace longspan::cuda
