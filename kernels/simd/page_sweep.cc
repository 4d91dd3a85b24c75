#include "kernels/simd/page_sweep.h"

#include <algorithm>

namespace longspan::simd {

void PageSweep::add_list(const Span* begin, const Span* end, int64_t first_page) {
  const int64_t first_token = first_page * kPageTokens;
  List list;
  list.next =
      std::partition_point(begin, end, [&](const Span& span) { return span.end <= first_token; });
  list.end = end;
  skip_to(list, first_page);
  lists_.push_back(list);
}

void PageSweep::skip_to(List& list, int64_t page) {
  while (list.next != list.end &&
         (list.next->end <= page * kPageTokens || list.next->begin >= list.next->end)) {
    ++list.next;
  }
  list.next_page = list.next == list.end ? kNoPage : std::max(page, list.next->begin / kPageTokens);
}

uint64_t PageSweep::mask(size_t list_index) const {
  const List& list = lists_[list_index];
  if (list.next_page != page_) {
    return 0;
  }
  const int64_t base = page_ * kPageTokens;
  uint64_t mask = 0;
  for (const Span* span = list.next; span != list.end && span->begin < base + kPageTokens; ++span) {
    const int64_t begin = std::max<int64_t>(span->begin - base, 0);
    const int64_t end = std::min<int64_t>(span->end - base, kPageTokens);
    if (begin < end) {
      mask |= (~uint64_t{0} >> (kPageTokens - (end - begin))) << begin;
    }
  }
  return mask;
}

void PageSweep::start() {
  page_ = kNoPage;
  for (const List& list : lists_) {
    page_ = std::min(page_, list.next_page);
  }
}

void PageSweep::advance() {
  const int64_t done = page_;
  page_ = kNoPage;
  for (List& list : lists_) {
    if (list.next_page == done) {
      skip_to(list, done + 1);
    }
    page_ = std::min(page_, list.next_page);
  }
}

}  // namespace longspan::simd
