#include "tests/support/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "base/checked.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/memory.h"
#include "tests/support/cases.h"

namespace longspan::testing {
namespace {

using cuda::CudaStream;
using cuda::DeviceBuffer;

// Whether elements are the same numbers in `dtype`.
bool fits(DataType dtype, const float* values, size_t count) {
  std::vector<float> rounded(values, values + count);
  round_to(dtype, rounded);
  return std::memcmp(rounded.data(), values, count * sizeof(float)) == 0;
}

// The device's copies of one call's arrays, for as long as the call lasts. The first failure stays,
// and everything after it does nothing.
class DeviceArrays {
 public:
  explicit DeviceArrays(CudaStream& stream) : stream_(stream) {}

  // `count` elements of the host; null for null. One array of the host is one on the device.
  template <class T>
  T* put(T* host, int64_t count) {
    return static_cast<T*>(put_bytes(host, static_cast<size_t>(count) * sizeof(T)));
  }

  // An array for results: poison on the device, copied to the host by fetch(). If the call reads it
  // as well, it has been put already.
  template <class T>
  T* put_result(T* host, int64_t count) {
    const size_t num_bytes = static_cast<size_t>(count) * sizeof(T);
    if (host == nullptr) {
      return nullptr;
    }
    if (!copies_.contains(host)) {
      const std::vector<std::byte> poison(num_bytes, std::byte{0xff});
      copies_[host] = upload(poison.data(), num_bytes);
    }
    results_.push_back({host, copies_[host], num_bytes});
    return reinterpret_cast<T*>(copies_[host]);
  }

  // Pages in one arena, 128-byte aligned, in another order than the entries.
  PagedView put(const PagedView& host) {
    PagedView device = host;
    const int64_t num_pages = divide_up(host.num_entries, kPageTokens);
    if (host.pages == nullptr || num_pages == 0) {
      device.pages = host.pages == nullptr ? nullptr : put(&kNoPage, 1);
      return device;
    }
    const size_t page_bytes = host.page_bytes();
    std::vector<std::byte> arena(static_cast<size_t>(num_pages) * page_bytes);
    for (int64_t page = 0; page < num_pages; ++page) {
      std::memcpy(
          arena.data() + place_of(page, num_pages) * page_bytes, host.pages[page], page_bytes);
    }
    std::byte* memory = upload(arena.data(), arena.size());
    std::vector<const std::byte*> pages;
    for (int64_t page = 0; page < num_pages && memory != nullptr; ++page) {
      pages.push_back(memory + place_of(page, num_pages) * page_bytes);
    }
    device.pages = reinterpret_cast<const std::byte* const*>(
        upload(pages.data(), pages.size() * sizeof(pages[0])));
    device.arena = memory;
    device.arena_bytes = arena.size();
    return device;
  }

  PagedView put_result(const PagedView& host) {
    const PagedView device = put(host);
    const int64_t num_pages = divide_up(host.num_entries, kPageTokens);
    for (int64_t page = 0; page < num_pages && device.arena != nullptr; ++page) {
      const std::byte* copy = device.arena + place_of(page, num_pages) * host.page_bytes();
      results_.push_back({const_cast<std::byte*>(host.pages[page]), copy, host.page_bytes()});
    }
    return device;
  }

  // An array of pointers to arrays of `count` floats.
  const float* const* put_pointers(const float* const* host, int num_pointers, int64_t count) {
    if (host == nullptr) {
      return nullptr;
    }
    std::vector<const float*> pointers;
    pointers.reserve(static_cast<size_t>(num_pointers));
    for (int i = 0; i < num_pointers; ++i) {
      pointers.push_back(put(host[i], count));
    }
    return reinterpret_cast<const float* const*>(
        upload(pointers.data(), pointers.size() * sizeof(pointers[0])));
  }

  // In `dtype`, which the values fit in.
  const float* put_encoded(DataType dtype, const float* host, size_t count) {
    const std::vector<std::byte> encoded = encode(dtype, std::vector<float>(host, host + count));
    return reinterpret_cast<const float*>(upload(encoded.data(), encoded.size()));
  }

  // What went wrong so far.
  const Status& status() const { return failure_; }

  // Waits for the call, then copies its results to the host.
  Status fetch() {
    LONGSPAN_RETURN_IF_ERROR(stream_.synchronize());
    for (const Result& result : results_) {
      LONGSPAN_RETURN_IF_ERROR(
          cuda::copy_to_host(result.host, result.device, result.num_bytes, native()));
    }
    return stream_.synchronize();
  }

 private:
  struct Result {
    void* host;
    const std::byte* device;
    size_t num_bytes;
  };
  static constexpr const std::byte* kNoPage = nullptr;

  static size_t place_of(int64_t page, int64_t num_pages) {
    return static_cast<size_t>(num_pages - 1 - page);
  }
  cudaStream_t native() { return static_cast<cudaStream_t>(stream_.native_handle()); }

  void* put_bytes(const void* host, size_t num_bytes) {
    if (host == nullptr) {
      return nullptr;
    }
    if (!copies_.contains(host)) {
      copies_[host] = upload(host, num_bytes);
    }
    return copies_[host];
  }

  std::byte* upload(const void* host, size_t num_bytes) {
    if (!failure_.ok()) {
      return nullptr;
    }
    // Something to point at for an empty array.
    StatusOr<DeviceBuffer> buffer = DeviceBuffer::allocate(std::max<size_t>(num_bytes, 1));
    failure_ = buffer.status();
    if (!failure_.ok()) {
      return nullptr;
    }
    buffers_.push_back(*std::move(buffer));
    failure_ = cuda::copy_to_device(buffers_.back().data(), host, num_bytes, native());
    return buffers_.back().data();
  }

  CudaStream& stream_;
  Status failure_;
  std::vector<DeviceBuffer> buffers_;
  std::map<const void*, std::byte*> copies_;
  std::vector<Result> results_;
};

class CudaTestBackend final : public Backend {
 public:
  CudaTestBackend() : backend_(make_cuda_backend({})) {}

  std::string_view name() const override { return backend_->name(); }
  std::string detail() const override { return backend_->detail(); }
  Status supports(const Problem& problem) const override { return backend_->supports(problem); }

  Status summarize(const SummarizeParams& host, Stream& /*stream*/) override {
    return run([&](DeviceArrays& arrays, CudaStream& stream) {
      SummarizeParams params = host;
      params.tokens = arrays.put(host.tokens);
      params.out = arrays.put_result(host.out);
      LONGSPAN_RETURN_IF_ERROR(arrays.status());
      return backend_->summarize(params, stream);
    });
  }

  Status search(const SearchParams& host, Stream& /*stream*/) override {
    return run([&](DeviceArrays& arrays, CudaStream& stream) {
      const SearchParams params = put_search(host, arrays);
      LONGSPAN_RETURN_IF_ERROR(arrays.status());
      return backend_->search(params, stream);
    });
  }

  Status attend(const AttendParams& host, Stream& /*stream*/) override {
    return run([&](DeviceArrays& arrays, CudaStream& stream) {
      const AttendParams params = put_attend(host, arrays);
      LONGSPAN_RETURN_IF_ERROR(arrays.status());
      return backend_->attend(params, stream);
    });
  }

  Status merge(const MergeParams& host, Stream& /*stream*/) override {
    return run([&](DeviceArrays& arrays, CudaStream& stream) {
      const int64_t num_elements = host.num_rows * host.value_dim;
      MergeParams params = host;
      params.part_out = arrays.put_pointers(host.part_out, host.num_parts, num_elements);
      params.part_lse = host.weights != nullptr
                            ? nullptr
                            : arrays.put_pointers(host.part_lse, host.num_parts, host.num_rows);
      params.weights = arrays.put_pointers(host.weights, host.num_parts, host.num_rows);
      params.sink_logits = arrays.put(host.sink_logits, host.num_rows);
      params.out = arrays.put_result(host.out, num_elements);
      params.lse = arrays.put_result(host.lse, host.num_rows);
      LONGSPAN_RETURN_IF_ERROR(arrays.status());
      return backend_->merge(params, stream);
    });
  }

 private:
  // `call` puts its arrays on the device and calls the backend with them.
  template <class Call>
  static Status run(Call call) {
    LONGSPAN_ASSIGN_OR_RETURN(const std::unique_ptr<CudaStream> stream, CudaStream::create());
    DeviceArrays arrays(*stream);
    LONGSPAN_RETURN_IF_ERROR(call(arrays, *stream));
    return arrays.fetch();
  }

  static AttendParams put_attend(const AttendParams& host, DeviceArrays& arrays) {
    AttendParams params = host;
    int64_t num_queries = host.num_rows;
    if (host.row_query != nullptr && host.num_rows > 0) {
      num_queries = *std::max_element(host.row_query, host.row_query + host.num_rows) + 1;
    }
    const int64_t num_elements = num_queries * host.num_query_heads * host.kv.key_dim;
    if (fits(host.kv.dtype, host.query, static_cast<size_t>(num_elements))) {
      params.query_dtype = host.kv.dtype;
      params.query =
          arrays.put_encoded(host.kv.dtype, host.query, static_cast<size_t>(num_elements));
    } else {
      params.query = arrays.put(host.query, num_elements);
    }
    params.row_query = arrays.put(host.row_query, host.num_rows);
    params.kv = arrays.put(host.kv);
    const int64_t num_lists = host.num_rows * host.num_selection_heads;
    params.span_offsets = arrays.put(host.span_offsets, num_lists + 1);
    params.spans = arrays.put(host.spans, host.span_offsets[num_lists]);
    const int64_t num_lanes = host.num_rows * host.num_query_heads;
    params.out = arrays.put_result(host.out, num_lanes * host.kv.value_dim);
    params.lse = arrays.put_result(host.lse, num_lanes);
    return params;
  }

  static SearchParams put_search(const SearchParams& host, DeviceArrays& arrays) {
    const SearchSpec& spec = *host.spec;
    const bool anchors = spec.view == SearchView::kAnchor;
    const bool softmax = spec.normalise == Normalise::kSoftmax;
    SearchParams params = host;
    params.query = arrays.put(host.query, host.num_rows * host.num_query_heads * host.view.key_dim);
    params.view = arrays.put(host.view);
    // What the search does not read may have any size.
    params.candidate_begin = anchors ? nullptr : arrays.put(host.candidate_begin, host.num_rows);
    params.candidate_end = anchors ? nullptr : arrays.put(host.candidate_end, host.num_rows);
    params.candidate_offsets =
        anchors ? arrays.put(host.candidate_offsets, host.num_rows + 1) : nullptr;
    params.candidates =
        anchors ? arrays.put(host.candidates, host.candidate_offsets[host.num_rows]) : nullptr;
    params.visible_entries = softmax ? arrays.put(host.visible_entries, host.num_rows) : nullptr;
    params.lse = softmax ? arrays.put(host.lse, host.num_rows * host.num_query_heads) : nullptr;
    params.halo = arrays.put(host.halo);
    params.k = arrays.put(host.k, host.num_rows);
    const int num_lists = num_selection_heads(spec, host.num_query_heads, host.view.num_kv_heads);
    const int64_t num_places = host.num_rows * num_lists * host.max_k;
    params.scores = arrays.put_result(host.scores, num_places);
    params.ids = arrays.put_result(host.ids, num_places);
    return params;
  }

  std::unique_ptr<Backend> backend_;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_test_backend() { return std::make_unique<CudaTestBackend>(); }

}  // namespace longspan::testing
