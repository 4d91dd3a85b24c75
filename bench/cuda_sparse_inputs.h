// Random inputs of the sparse decode step, on the device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "bench/cuda_sparse_cases.h"
#include "bench/cuda_support.h"
#include "kernels/cuda/sparse_decode.h"

namespace longspan::cuda {

inline constexpr float kSparseInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kSparseNaN = std::numeric_limits<float>::quiet_NaN();

// 16-bit numbers, drawn from a table.
class SparseDraws {
 public:
  SparseDraws(DataType dtype, bool whole, std::mt19937_64& random)
      : random_(random), table_(1 << 14) {
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> integer(-2, 2);
    for (uint16_t& number : table_) {
      store_element(
          dtype, &number, 0, whole ? static_cast<float>(integer(random_)) : normal(random_));
    }
  }
  void fill(uint16_t* data, size_t count) {
    for (size_t i = 0; i < count; i += 4) {
      uint64_t bits = random_();
      for (size_t j = i; j < std::min(count, i + 4); ++j, bits >>= 16) {
        data[j] = table_[bits % table_.size()];
      }
    }
  }

 private:
  std::mt19937_64& random_;
  std::vector<uint16_t> table_;
};

// On the device. Pages lie in random order; what no row sees is NaN.
class SparseInputs {
 public:
  SparseInputs(const SparseCase& c, std::mt19937_64& random) : case_(c), random_(random) {
    make_query();
    make_summaries();
    make_context();
    make_rows();
  }

  SparseDecodeArgs args() const {
    const SearchShape& shape = case_.shape.search;
    SparseDecodeArgs args;
    args.shape = case_.shape;
    args.search.shape = shape;
    args.search.query = search_query_->data();
    args.search.pages = summary_pages_->data();
    args.search.candidate_begin = begin_->data();
    args.search.candidate_end = end_->data();
    args.search.k = k_->data();
    args.query = query_->data();
    args.kv = view_;
    args.num_tokens = num_tokens_->data();
    args.scale = 1.0F / std::sqrt(static_cast<float>(shape.dim));
    args.soft_cap = case_.soft_cap;
    args.out_dtype = case_.out_dtype;
    return args;
  }
  const std::vector<int64_t>& begin() const { return host_begin_; }
  const std::vector<int64_t>& end() const { return host_end_; }
  const std::vector<int64_t>& k() const { return host_k_; }
  const std::vector<int64_t>& num_tokens() const { return host_tokens_; }

 private:
  bool whole() const {
    return case_.numbers == SparseNumbers::kWhole || case_.numbers == SparseNumbers::kSpecial;
  }

  // Both queries.
  void make_query() {
    const SearchShape& shape = case_.shape.search;
    const auto count = static_cast<size_t>(shape.num_rows * shape.num_query_heads * shape.dim);
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> integer(-2, 2);
    const auto make = [&](DataType dtype, bool whole) {
      std::vector<float> values(count);
      std::vector<std::byte> bytes(count * size_of(dtype));
      for (size_t i = 0; i < count; ++i) {
        values[i] = whole ? static_cast<float>(integer(random_)) : normal(random_);
        store_element(dtype, bytes.data(), i, values[i]);
      }
      search_values_ = search_values_.empty() ? values : search_values_;
      return std::make_unique<Device<std::byte>>(bytes);
    };
    search_query_ = make(shape.query_dtype, whole());
    query_ = make(case_.shape.attention_query_dtype, false);
  }

  std::vector<int64_t> random_order(int64_t count) {
    std::vector<int64_t> order(static_cast<size_t>(count));
    for (size_t i = 0; i < order.size(); ++i) {
      order[i] = static_cast<int64_t>(i);
    }
    std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  void make_summaries() {
    const SearchShape& shape = case_.shape.search;
    const int64_t num_pages = (shape.num_entries + kPageTokens - 1) / kPageTokens;
    const auto head_elements = static_cast<size_t>(kPageTokens) * static_cast<size_t>(shape.dim);
    const size_t page_elements = head_elements * static_cast<size_t>(shape.num_kv_heads);
    std::vector<uint16_t> arena(page_elements * static_cast<size_t>(num_pages));
    SparseDraws draws(shape.dtype, whole(), random_);
    draws.fill(arena.data(), arena.size());
    const std::vector<int64_t> order = random_order(num_pages);
    const int64_t hot_page = num_pages / 2;
    const int per_head = shape.num_query_heads / shape.num_kv_heads;
    for (int64_t entry = 0; entry < num_pages * kPageTokens; ++entry) {
      const auto place = static_cast<size_t>(order[static_cast<size_t>(entry / kPageTokens)]);
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        uint16_t* row = arena.data() + place * page_elements +
                        static_cast<size_t>(head) * head_elements +
                        static_cast<size_t>(entry % kPageTokens * shape.dim);
        for (int d = 0; d < shape.dim; ++d) {
          if (entry >= shape.num_entries) {
            store_element(shape.dtype, row, static_cast<size_t>(d), kSparseNaN);
          } else if (case_.numbers == SparseNumbers::kEqual) {
            store_element(shape.dtype, row, static_cast<size_t>(d), static_cast<float>(d % 5 - 2));
          } else if (case_.numbers == SparseNumbers::kHotPage && entry / kPageTokens == hot_page) {
            const float direction =
                search_values_[static_cast<size_t>(head * per_head * shape.dim + d)];
            const float noise = static_cast<float>(random_() % 1000) * 1e-4F;
            store_element(shape.dtype, row, static_cast<size_t>(d), direction * (3 + noise));
          } else if (case_.numbers == SparseNumbers::kSpecial && random_() % 3000 == 0) {
            const float special[] = {kSparseNaN, kSparseInfinity, -kSparseInfinity};
            store_element(shape.dtype, row, static_cast<size_t>(d), special[random_() % 3]);
          }
        }
      }
    }
    summaries_ = std::make_unique<Device<uint16_t>>(arena);
    std::vector<const std::byte*> pages;
    for (const int64_t place : order) {
      pages.push_back(reinterpret_cast<const std::byte*>(
          summaries_->data() + static_cast<size_t>(place) * page_elements));
    }
    summary_pages_ = std::make_unique<Device<const std::byte*>>(pages);
  }

  void make_context() {
    const SearchShape& shape = case_.shape.search;
    const int64_t num_pages = (case_.num_tokens + kPageTokens - 1) / kPageTokens;
    const int64_t places =
        std::max<int64_t>(1, case_.arena_pages > 0 ? case_.arena_pages : num_pages);
    const auto head_elements = static_cast<size_t>(kPageTokens) * static_cast<size_t>(shape.dim);
    const size_t page_elements = head_elements * 2 * static_cast<size_t>(shape.num_kv_heads);
    // The last place is the last page's alone: what lies behind the context is NaN.
    std::vector<uint16_t> arena(page_elements * static_cast<size_t>(places + 1));
    SparseDraws draws(shape.dtype, false, random_);
    draws.fill(arena.data(), arena.size());
    for (size_t i = 0; i < page_elements; ++i) {
      const auto token = static_cast<int64_t>(i / static_cast<size_t>(shape.dim) % kPageTokens);
      if (token >= case_.num_tokens - (num_pages - 1) * kPageTokens) {
        store_element(
            shape.dtype, arena.data(), static_cast<size_t>(places) * page_elements + i, kSparseNaN);
      }
    }
    arena_ = std::make_unique<Device<uint16_t>>(arena);
    const std::vector<int64_t> order = random_order(places);
    std::vector<const std::byte*> pages;
    for (int64_t page = 0; page < num_pages; ++page) {
      const int64_t place =
          page == num_pages - 1 ? places : order[static_cast<size_t>(page % places)];
      pages.push_back(reinterpret_cast<const std::byte*>(
          arena_->data() + static_cast<size_t>(place) * page_elements));
    }
    pages_ = std::make_unique<Device<const std::byte*>>(pages);
    view_.pages = pages_->data();
    view_.num_entries = case_.num_tokens;
    view_.dtype = shape.dtype;
    view_.num_kv_heads = shape.num_kv_heads;
    view_.key_dim = shape.dim;
    view_.value_dim = shape.dim;
    view_.arena = reinterpret_cast<const std::byte*>(arena_->data());
    view_.arena_bytes = arena.size() * 2;
  }

  void make_rows() {
    const SearchShape& shape = case_.shape.search;
    const ForcedTokens& forced = case_.shape.forced;
    for (int64_t row = 0; row < shape.num_rows; ++row) {
      const int64_t tokens =
          std::max<int64_t>(0, case_.num_tokens - 37 * (shape.num_rows - 1 - row));
      const int64_t pages = (tokens + kPageTokens - 1) / kPageTokens;
      const int64_t whole_blocks = tokens / kPageTokens;
      host_tokens_.push_back(tokens);
      host_begin_.push_back(case_.overlap ? 0 : forced.first_blocks);
      host_end_.push_back(case_.overlap ? whole_blocks
                                        : std::min(whole_blocks, pages - forced.last_blocks));
      host_end_.back() = std::max(host_end_.back(), host_begin_.back());
      host_k_.push_back(std::max<int64_t>(0, shape.max_k - 3 * row));
    }
    begin_ = std::make_unique<Device<int64_t>>(host_begin_);
    end_ = std::make_unique<Device<int64_t>>(host_end_);
    k_ = std::make_unique<Device<int64_t>>(host_k_);
    num_tokens_ = std::make_unique<Device<int64_t>>(host_tokens_);
  }

  const SparseCase& case_;
  std::mt19937_64& random_;
  std::vector<float> search_values_;
  std::unique_ptr<Device<std::byte>> search_query_, query_;
  std::unique_ptr<Device<uint16_t>> summaries_, arena_;
  std::unique_ptr<Device<const std::byte*>> summary_pages_, pages_;
  std::unique_ptr<Device<int64_t>> begin_, end_, k_, num_tokens_;
  std::vector<int64_t> host_begin_, host_end_, host_k_, host_tokens_;
  PagedView view_;
};

}  // namespace longspan::cuda
