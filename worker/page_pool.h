// The page memory of one rank: pages of a few sizes out of one capacity, shared by counting
// references. What is needed to find a page again is kept beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "base/status.h"

namespace longspan {

using PageId = uint32_t;

// Where a page belongs; of a shared page, who wrote it first.
struct PageTag {
  uint64_t context = 0;
  int layer = 0;
  int stream = 0;  // place in ShardMap::streams()
  int64_t first_entry = 0;
  bool operator==(const PageTag&) const = default;
};

// Lives as long as its rank; used by the rank's engine thread alone. Memory comes in slabs of one
// page size; a slab goes back when its last page is released, so that sizes do not starve each
// other.
class PagePool {
 public:
  explicit PagePool(int64_t capacity_bytes);
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;
  ~PagePool();

  // What a page of `bytes` takes of the capacity.
  static int64_t charge(size_t bytes);

  // Uninitialised, with one reference. RESOURCE_EXHAUSTED when the capacity is used up.
  StatusOr<PageId> allocate(size_t bytes, const PageTag& tag);
  void add_reference(PageId page) { ++pages_[page].references; }
  void release(PageId page);

  std::byte* data(PageId page) { return pages_[page].data; }
  bool is_shared(PageId page) const { return pages_[page].references > 1; }
  size_t bytes(PageId page) const { return pages_[page].bytes; }
  const PageTag& tag(PageId page) const { return pages_[page].tag; }

  int64_t used_bytes() const { return used_bytes_; }
  int64_t capacity_bytes() const { return capacity_bytes_; }
  int64_t num_slabs() const { return num_slabs_; }

 private:
  struct Slab;
  // Slabs of one page size that have a free page; owns all of its slabs.
  struct SizeClass {
    std::vector<std::unique_ptr<Slab>> slabs;
    std::vector<Slab*> with_space;
  };
  struct Page {
    std::byte* data = nullptr;
    size_t bytes = 0;
    uint32_t references = 0;
    Slab* slab = nullptr;
    PageTag tag;
  };

  StatusOr<Slab*> slab_with_space(SizeClass& size_class, size_t page_bytes);
  void free_slab(SizeClass& size_class, Slab* slab);

  const int64_t capacity_bytes_;
  int64_t used_bytes_ = 0;
  int64_t num_slabs_ = 0;
  std::map<size_t, SizeClass> classes_;  // by charged page bytes
  std::vector<Page> pages_;
  std::vector<PageId> free_ids_;
};

}  // namespace longspan
