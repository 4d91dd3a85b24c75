// What the parts of cuda_decode share: device memory, random contexts with lists and queries.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/cuda_check_memory.h"
#include "kernels/cuda/attend_decode.h"
#include "kernels/cuda/attend_pages.h"
#include "kernels/cuda/convert.h"

namespace longspan::cuda {
namespace {

constexpr double kInfinity = __builtin_huge_val();

struct Device {
  int num_sms = 0;
  size_t shared_memory = 0;
  cudaStream_t stream = nullptr;
};

__device__ __forceinline__ float normal(uint64_t seed, uint64_t index) {
  const uint64_t bits = mix(mix(seed) + index);
  const float u = (static_cast<float>(bits & 0xffffff) + 1.0F) / 16777216.0F;
  const float v = static_cast<float>((bits >> 24) & 0xffffff) / 16777216.0F;
  return sqrtf(-2.0F * logf(u)) * cospif(2.0F * v);
}

__global__ void fill_normal(
    DataType type, void* data, size_t count, float deviation, uint64_t seed) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    store_as(type, data, i, deviation * normal(seed, i));
  }
}

// Keys and values of the tokens that some row sees; the others stay what the arena was poisoned
// with.
__global__ void fill_tokens(const PagedView view, const uint8_t* seen, uint64_t seed) {
  const int64_t token = blockIdx.x;
  if (seen[token] == 0) {
    return;
  }
  const int row = view.key_dim + view.value_dim;
  for (int i = threadIdx.x; i < view.num_kv_heads * row; i += blockDim.x) {
    const int head = i / row;
    const int d = i % row;
    const float value = normal(seed, static_cast<uint64_t>(token) * 65536 + i);
    if (d < view.key_dim) {
      store_as(view.dtype, const_cast<std::byte*>(view.key(token, head)), d, value);
    } else {
      store_as(
          view.dtype, const_cast<std::byte*>(view.value(token, head)), d - view.key_dim, value);
    }
  }
}

// key: channel < D, value: channel - D.
__global__ void set_element(
    const PagedView view, int64_t token, int head, int channel, float value) {
  const bool is_key = channel < view.key_dim;
  const std::byte* row = is_key ? view.key(token, head) : view.value(token, head);
  store_as(
      view.dtype, const_cast<std::byte*>(row), is_key ? channel : channel - view.key_dim, value);
}

enum class Lists {
  kDense,     // one span [0, n)
  kWindow,    // [some odd begin, n)
  kBlocks64,  // about a quarter of the blocks, the last one always
  kBlocks16,
  kSpans,      // of 0 to 150 tokens, with gaps
  kTinySpans,  // of 1 to 3 tokens
  kSomeEmpty,  // a third of the lists has no span
};
const char* const kListNames[] = {
    "dense", "window", "blocks64", "blocks16", "spans", "tiny", "some empty"};

struct Case {
  int num_rows = 1;
  int num_query_heads = 8;
  int num_kv_heads = 2;
  int key_dim = 128;
  int value_dim = 128;
  DataType kv_dtype = DataType::kBFloat16;
  DataType query_dtype = DataType::kBFloat16;
  DataType out_dtype = DataType::kFloat32;
  int num_selection_heads = 1;
  Lists lists = Lists::kDense;
  int64_t num_tokens = 0;
  bool contexts_of_rows = false;  // each row has a context and a length of its own
  bool row_query = false;
  float soft_cap = 0.0F;
  bool as_pages = false;  // by attend_pages, the spans cut into entries of pages
  int max_cluster_size = 16;
};

std::string describe(const Case& c) {
  char text[256];
  const std::string pages =
      c.as_pages ? ", pages, clusters of " + std::to_string(c.max_cluster_size) : "";
  std::snprintf(text,
                sizeof(text),
                "n=%ld T=%d heads %d/%d d %d/%d %s q %s out %s S=%d %s%s%s%s%s",
                static_cast<long>(c.num_tokens),
                c.num_rows,
                c.num_query_heads,
                c.num_kv_heads,
                c.key_dim,
                c.value_dim,
                to_string(c.kv_dtype).data(),
                to_string(c.query_dtype).data(),
                to_string(c.out_dtype).data(),
                c.num_selection_heads,
                kListNames[static_cast<int>(c.lists)],
                c.contexts_of_rows ? ", batch" : "",
                c.row_query ? ", row_query" : "",
                c.soft_cap > 0 ? ", soft cap" : "",
                pages.c_str());
  return text;
}

using Random = std::mt19937_64;

int64_t pick(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

std::vector<Span> make_list(Lists lists, int64_t n, Random& random) {
  std::vector<Span> spans;
  const auto blocks = [&](int64_t size) {
    for (int64_t begin = 0; begin < n; begin += size) {
      const int64_t end = std::min(n, begin + size);
      if (end == n || pick(random, 0, 3) == 0) {
        spans.push_back({begin, end});
      }
    }
  };
  const auto pieces = [&](int64_t shortest, int64_t longest, int64_t gap) {
    for (int64_t begin = pick(random, 0, gap); begin < n;) {
      const int64_t end = std::min(n, begin + pick(random, shortest, longest));
      spans.push_back({begin, end});
      begin = end + pick(random, 0, gap);
    }
  };
  switch (lists) {
    case Lists::kDense:
      spans.push_back({0, n});
      break;
    case Lists::kWindow:
      spans.push_back({n == 0 ? 0 : pick(random, 0, n - 1), n});
      break;
    case Lists::kBlocks64:
      blocks(64);
      break;
    case Lists::kBlocks16:
      blocks(16);
      break;
    case Lists::kSomeEmpty:
      if (pick(random, 0, 2) == 0) {
        break;
      }
      [[fallthrough]];
    case Lists::kSpans:
      pieces(0, 150, 100);
      break;
    case Lists::kTinySpans:
      pieces(1, 3, 9);
      break;
  }
  return spans;
}

// The tokens of a list as entries of pages.
std::vector<PageTokens> page_list(const std::vector<Span>& spans) {
  std::vector<PageTokens> entries;
  for (const Span span : spans) {
    for (int64_t begin = span.begin; begin < span.end;) {
      const int64_t page = begin / kPageTokens;
      const int64_t end = std::min(span.end, (page + 1) * kPageTokens);
      entries.push_back({static_cast<int32_t>(page),
                         static_cast<int16_t>(begin - page * kPageTokens),
                         static_cast<int16_t>(end - page * kPageTokens)});
      begin = end;
    }
  }
  return entries;
}

// Contexts in one arena, its pages in random order, with queries, lists and outputs.
class Setup {
 public:
  Setup(const Case& c, Random& random) : case_(c), random_(random) {
    const int contexts = c.contexts_of_rows ? c.num_rows : 1;
    for (int i = 0; i < contexts; ++i) {
      lengths_.push_back(c.contexts_of_rows ? pick(random, 0, c.num_tokens) : c.num_tokens);
      first_page_.push_back(num_pages_);
      num_pages_ += (lengths_.back() + kPageTokens - 1) / kPageTokens;
    }
    make_lists();
    make_pages();
    make_queries();
    make_page_lists();
  }

  const DecodeArgs& args() const { return args_; }
  DecodeArgs& args() { return args_; }
  // Those of `args`, with the lists as pages.
  AttendPagesArgs pages_args() const {
    AttendPagesArgs args;
    args.params = args_.params;
    args.params.span_offsets = nullptr;
    args.params.spans = nullptr;
    args.row_pages = args_.row_pages;
    args.page_lists = page_lists_->data();
    args.max_pages = max_pages_;
    args.max_cluster_size = case_.max_cluster_size;
    return args;
  }
  // Instead of all lists, of which there is one.
  void set_list(const Span& span) {
    spans_ = {span};
    device_spans_ = std::make_unique<Memory<Span>>(spans_);
    args_.params.spans = device_spans_->data();
    make_page_lists();
  }
  const Case& test_case() const { return case_; }
  PagedView view(int row) const {
    PagedView view = args_.params.kv;
    const size_t context = case_.contexts_of_rows ? static_cast<size_t>(row) : 0;
    view.pages = pages_->data() + first_page_[context];
    view.num_entries = lengths_[context];
    return view;
  }
  const std::vector<Span>& spans() const { return spans_; }
  const std::vector<int64_t>& offsets() const { return offsets_; }
  std::vector<std::byte> out() const { return out_->host(); }
  std::vector<float> lse() const { return lse_->host(); }
  std::vector<std::byte> arena() const { return arena_->host(); }
  std::vector<std::byte> query() const { return query_->host(); }
  std::vector<const std::byte*> pages() const { return pages_->host(); }
  size_t arena_bytes() const { return arena_->size(); }
  int64_t first_page(int row) const {
    return first_page_[case_.contexts_of_rows ? static_cast<size_t>(row) : 0];
  }

 private:
  void make_lists() {
    const Case& c = case_;
    offsets_ = {0};
    for (int row = 0; row < c.num_rows; ++row) {
      for (int s = 0; s < c.num_selection_heads; ++s) {
        const int64_t n = lengths_[c.contexts_of_rows ? static_cast<size_t>(row) : 0];
        const std::vector<Span> list = make_list(c.lists, n, random_);
        spans_.insert(spans_.end(), list.begin(), list.end());
        offsets_.push_back(static_cast<int64_t>(spans_.size()));
      }
    }
    device_spans_ = std::make_unique<Memory<Span>>(spans_);
    device_offsets_ = std::make_unique<Memory<int64_t>>(offsets_);
    AttendParams& params = args_.params;
    params.num_rows = c.num_rows;
    params.num_query_heads = c.num_query_heads;
    params.num_selection_heads = c.num_selection_heads;
    params.span_offsets = device_offsets_->data();
    params.spans = device_spans_->data();
  }

  // Each list in random order, with entries that are not used among the others.
  void make_page_lists() {
    std::vector<std::vector<PageTokens>> lists;
    size_t longest = 0;
    for (size_t list = 0; list + 1 < offsets_.size(); ++list) {
      lists.push_back(
          page_list({spans_.begin() + offsets_[list], spans_.begin() + offsets_[list + 1]}));
      longest = std::max(longest, lists.back().size());
    }
    longest += static_cast<size_t>(pick(random_, 0, 20));
    std::vector<PageTokens> entries;
    for (std::vector<PageTokens>& list : lists) {
      while (list.size() < longest) {
        const auto end = static_cast<int16_t>(pick(random_, 0, kPageTokens));
        const auto begin = static_cast<int16_t>(pick(random_, end, kPageTokens));
        list.push_back({static_cast<int32_t>(pick(random_, -9, 1 << 30)), begin, end});
      }
      std::shuffle(list.begin(), list.end(), random_);
      entries.insert(entries.end(), list.begin(), list.end());
    }
    max_pages_ = static_cast<int64_t>(longest);
    page_lists_ = std::make_unique<Memory<PageTokens>>(entries);
  }

  void make_pages() {
    const Case& c = case_;
    PagedView& kv = args_.params.kv;
    kv.dtype = c.kv_dtype;
    kv.num_kv_heads = c.num_kv_heads;
    kv.key_dim = c.key_dim;
    kv.value_dim = c.value_dim;
    kv.num_entries = c.num_tokens;
    constexpr int64_t kSparePages = 3;
    kv.arena_bytes = kv.page_bytes() * static_cast<size_t>(num_pages_ + kSparePages);
    arena_ = std::make_unique<Memory<std::byte>>(kv.arena_bytes);
    kv.arena = arena_->data();
    std::vector<int64_t> places(static_cast<size_t>(num_pages_ + kSparePages));
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), random_);
    std::vector<const std::byte*> pages;
    for (int64_t i = 0; i < num_pages_; ++i) {
      pages.push_back(arena_->data() +
                      kv.page_bytes() * static_cast<size_t>(places[static_cast<size_t>(i)]));
    }
    pages_ = std::make_unique<Memory<const std::byte*>>(pages);
    kv.pages = pages_->data();
    std::vector<const std::byte* const*> tables;
    for (int row = 0; row < (c.contexts_of_rows ? c.num_rows : 1); ++row) {
      tables.push_back(pages_->data() + first_page(row));
      fill_context(row);
    }
    tables_ = std::make_unique<Memory<const std::byte* const*>>(tables);
    args_.row_pages = c.contexts_of_rows ? tables_->data() : nullptr;
  }

  void fill_context(int row) {
    const PagedView context = view(row);
    if (context.num_entries == 0) {
      return;
    }
    std::vector<uint8_t> seen(static_cast<size_t>(context.num_entries), 0);
    const int lists = case_.num_selection_heads;
    const int first_list = case_.contexts_of_rows ? row * lists : 0;
    const int end_list = case_.contexts_of_rows ? first_list + lists : case_.num_rows * lists;
    for (int64_t i = offsets_[static_cast<size_t>(first_list)];
         i < offsets_[static_cast<size_t>(end_list)];
         ++i) {
      const Span span = spans_[static_cast<size_t>(i)];
      std::fill(seen.begin() + span.begin, seen.begin() + span.end, 1);
    }
    const Memory<uint8_t> device_seen(seen);
    fill_tokens<<<static_cast<unsigned>(context.num_entries), 128>>>(
        context, device_seen.data(), random_());
    cudaDeviceSynchronize();
  }

  void make_queries() {
    const Case& c = case_;
    AttendParams& params = args_.params;
    const size_t queries =
        static_cast<size_t>(c.num_rows + 1) * c.num_query_heads * static_cast<size_t>(c.key_dim);
    query_ = std::make_unique<Memory<std::byte>>(queries * size_of(c.query_dtype));
    fill_normal<<<64, 256>>>(c.query_dtype, query_->data(), queries, 1.0F, random_());
    params.query = reinterpret_cast<const float*>(query_->data());
    params.query_dtype = c.query_dtype;
    std::vector<int64_t> row_query(static_cast<size_t>(c.num_rows));
    for (size_t i = 0; i < row_query.size(); ++i) {
      row_query[i] = c.num_rows - static_cast<int64_t>(i);
    }
    row_query_ = std::make_unique<Memory<int64_t>>(row_query);
    params.row_query = c.row_query ? row_query_->data() : nullptr;
    params.scale = 1.5F / std::sqrt(static_cast<float>(c.key_dim));
    params.soft_cap = c.soft_cap;
    const size_t rows = static_cast<size_t>(c.num_rows) * static_cast<size_t>(c.num_query_heads);
    out_ = std::make_unique<Memory<std::byte>>(rows * static_cast<size_t>(c.value_dim) *
                                               size_of(c.out_dtype));
    lse_ = std::make_unique<Memory<float>>(rows);
    params.out = reinterpret_cast<float*>(out_->data());
    params.out_dtype = c.out_dtype;
    params.lse = lse_->data();
  }

  Case case_;
  Random& random_;
  std::vector<int64_t> lengths_;     // [contexts]
  std::vector<int64_t> first_page_;  // [contexts]
  int64_t num_pages_ = 0;
  std::vector<Span> spans_;
  std::vector<int64_t> offsets_;
  int64_t max_pages_ = 0;
  std::unique_ptr<Memory<Span>> device_spans_;
  std::unique_ptr<Memory<PageTokens>> page_lists_;
  std::unique_ptr<Memory<int64_t>> device_offsets_;
  std::unique_ptr<Memory<std::byte>> arena_;
  std::unique_ptr<Memory<const std::byte*>> pages_;
  std::unique_ptr<Memory<const std::byte* const*>> tables_;
  std::unique_ptr<Memory<std::byte>> query_;
  std::unique_ptr<Memory<int64_t>> row_query_;
  std::unique_ptr<Memory<std::byte>> out_;
  std::unique_ptr<Memory<float>> lse_;
  DecodeArgs args_;
};

}  // namespace
}  // namespace longspan::cuda
