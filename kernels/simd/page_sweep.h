// Walks the span lists of a tile of rows together, page by page.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/params.h"

namespace longspan::simd {

// Stops at each page that some list has a token of, once and in order.
class PageSweep {
 public:
  static constexpr int64_t kNoPage = std::numeric_limits<int64_t>::max();

  void clear() { lists_.clear(); }
  // Spans ascending and disjoint; what lies before page `first_page` is left out.
  void add_list(const Span* begin, const Span* end, int64_t first_page);
  size_t num_lists() const { return lists_.size(); }

  // The page to look at, or kNoPage.
  int64_t page() const { return page_; }
  // Tokens of page() in list `list`, bit i for the i-th; 0 when there are none.
  uint64_t mask(size_t list) const;
  // To the first page, after the last add_list, and from one page to the next.
  void start();
  void advance();

 private:
  struct List {
    const Span* next = nullptr;  // the first span that reaches into next_page
    const Span* end = nullptr;
    int64_t next_page = kNoPage;
  };
  static void skip_to(List& list, int64_t page);

  std::vector<List> lists_;
  int64_t page_ = kNoPage;
};

}  // namespace longspan::simd
