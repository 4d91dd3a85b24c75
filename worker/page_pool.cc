#include "worker/page_pool.h"

#include <algorithm>
#include <new>
#include <sys/mman.h>

#include "absl/strings/str_cat.h"

#include "base/checked.h"
#include "base/device.h"

namespace longspan {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr size_t kSlabBytes = size_t{4} << 20;

}  // namespace

// Aligned to huge pages and asked to use them: a scan over a million tokens touches a thousand
// times fewer translations.
struct PagePool::Slab {
  explicit Slab(size_t bytes)
      : memory(static_cast<std::byte*>(
            ::operator new (bytes, std::align_val_t{kHugePageBytes}, std::nothrow))) {
    if (memory != nullptr) {
      (void)madvise(memory.get(), bytes, MADV_HUGEPAGE);  // advice: refusal costs speed alone
    }
  }

  struct Release {
    void operator()(std::byte* data) const {
      ::operator delete (data, std::align_val_t{kHugePageBytes});
    }
  };
  std::unique_ptr<std::byte, Release> memory;
  size_t num_pages = 0;
  std::vector<std::byte*> free_pages;
  size_t index = 0;             // in SizeClass::slabs
  size_t with_space_index = 0;  // in SizeClass::with_space, where free_pages is not empty
};

PagePool::PagePool(int64_t capacity_bytes) : capacity_bytes_(capacity_bytes) {}
PagePool::~PagePool() = default;

int64_t PagePool::charge(size_t bytes) {
  return divide_up(static_cast<int64_t>(bytes), kBufferAlignment) *
         static_cast<int64_t>(kBufferAlignment);
}

StatusOr<PagePool::Slab*> PagePool::slab_with_space(SizeClass& size_class, size_t page_bytes) {
  if (!size_class.with_space.empty()) {
    return size_class.with_space.back();
  }
  const size_t num_pages = std::max<size_t>(kSlabBytes / page_bytes, 1);
  auto slab = std::make_unique<Slab>(num_pages * page_bytes);
  if (slab->memory == nullptr) {
    return absl::ResourceExhaustedError("out of host memory for pages");
  }
  slab->num_pages = num_pages;
  slab->free_pages.reserve(num_pages);
  for (size_t i = num_pages; i > 0; --i) {  // the lowest address is handed out first
    slab->free_pages.push_back(slab->memory.get() + (i - 1) * page_bytes);
  }
  slab->index = size_class.slabs.size();
  size_class.with_space.push_back(slab.get());
  size_class.slabs.push_back(std::move(slab));
  ++num_slabs_;
  return size_class.with_space.back();
}

StatusOr<PageId> PagePool::allocate(size_t bytes, const PageTag& tag) {
  const int64_t charged = charge(bytes);
  if (charged > capacity_bytes_ - used_bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat("a page of ",
                                                     charged,
                                                     " bytes does not fit: ",
                                                     used_bytes_,
                                                     " of ",
                                                     capacity_bytes_,
                                                     " bytes are in use"));
  }
  SizeClass& size_class = classes_[static_cast<size_t>(charged)];
  LONGSPAN_ASSIGN_OR_RETURN(Slab * slab, slab_with_space(size_class, static_cast<size_t>(charged)));
  PageId id = 0;
  if (free_ids_.empty()) {
    id = static_cast<PageId>(pages_.size());
    pages_.emplace_back();
  } else {
    id = free_ids_.back();
    free_ids_.pop_back();
  }
  pages_[id] = {slab->free_pages.back(), bytes, 1, slab, tag};
  slab->free_pages.pop_back();
  if (slab->free_pages.empty()) {
    size_class.with_space.pop_back();
  } else {
    slab->with_space_index = size_class.with_space.size() - 1;
  }
  used_bytes_ += charged;
  return id;
}

void PagePool::release(PageId id) {
  Page& page = pages_[id];
  LONGSPAN_CHECK(page.references > 0);
  if (--page.references > 0) {
    return;
  }
  const int64_t charged = charge(page.bytes);
  SizeClass& size_class = classes_[static_cast<size_t>(charged)];
  Slab* slab = page.slab;
  if (slab->free_pages.empty()) {
    slab->with_space_index = size_class.with_space.size();
    size_class.with_space.push_back(slab);
  }
  slab->free_pages.push_back(page.data);
  if (slab->free_pages.size() == slab->num_pages) {
    free_slab(size_class, slab);
  }
  page = {};
  free_ids_.push_back(id);
  used_bytes_ -= charged;
}

void PagePool::free_slab(SizeClass& size_class, Slab* slab) {
  Slab* const last_with_space = size_class.with_space.back();
  size_class.with_space[slab->with_space_index] = last_with_space;
  last_with_space->with_space_index = slab->with_space_index;
  size_class.with_space.pop_back();

  const size_t index = slab->index;
  size_class.slabs[index].swap(size_class.slabs.back());
  size_class.slabs[index]->index = index;
  size_class.slabs.pop_back();
  --num_slabs_;
}

}  // namespace longspan
