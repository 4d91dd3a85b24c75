#include "tests/support/cases.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <utility>

#include "base/checked.h"
#include "base/status.h"

namespace longspan::testing {
namespace {

uint64_t choose_seed() {
  const char* given = std::getenv("LONGSPAN_TEST_SEED");
  const uint64_t seed =
      given != nullptr ? std::strtoull(given, nullptr, 10) : uint64_t{std::random_device{}()};
  std::fprintf(stderr, "LONGSPAN_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

}  // namespace

uint64_t test_seed() {
  static const uint64_t kSeed = choose_seed();
  return kSeed;
}

float Case::attention_scale() const {
  return scale != 0.0F ? scale : 1.0F / std::sqrt(static_cast<float>(key_dim));
}

std::ostream& operator<<(std::ostream& stream, const Case& test_case) {
  return stream << test_case.name << " " << test_case.num_query_heads << "/"
                << test_case.num_kv_heads << " heads, dims " << test_case.key_dim << "/"
                << test_case.value_dim << " " << to_string(test_case.dtype) << ", "
                << test_case.num_rows << " rows at the end of " << test_case.num_tokens
                << " tokens, soft cap " << test_case.soft_cap << ", method \""
                << test_case.method.name << "\", seed " << test_seed();
}

CaseTensors make_tensors(const Case& test_case, Random& random) {
  const auto rows = static_cast<size_t>(test_case.num_rows);
  const auto tokens = static_cast<size_t>(test_case.num_tokens);
  const auto query_heads = static_cast<size_t>(test_case.num_query_heads);
  const auto kv_heads = static_cast<size_t>(test_case.num_kv_heads);
  const auto key_dim = static_cast<size_t>(test_case.key_dim);
  const auto value_dim = static_cast<size_t>(test_case.value_dim);
  CaseTensors tensors;
  tensors.query = random.normals(rows * query_heads * key_dim);
  tensors.search_query = random.normals(rows * query_heads * key_dim);
  tensors.keys = random.normals(tokens * kv_heads * key_dim);
  tensors.values = random.normals(tokens * kv_heads * value_dim);
  round_to(test_case.dtype, tensors.keys);
  round_to(test_case.dtype, tensors.values);
  tensors.gates = random.normals(rows * query_heads * test_case.method.branches.size());
  for (float& gate : tensors.gates) {
    gate = 1.0F / (1.0F + std::exp(-gate));
  }
  return tensors;
}

void round_to(DataType dtype, std::vector<float>& values) {
  for (float& value : values) {
    uint32_t stored = 0;
    store_element(dtype, &stored, 0, value);
    value = load_element(dtype, &stored, 0);
  }
}

std::vector<std::byte> encode(DataType dtype, const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    store_element(dtype, bytes.data(), i, values[i]);
  }
  return bytes;
}

std::vector<float> poisoned(size_t count) {
  return std::vector<float>(count, std::numeric_limits<float>::quiet_NaN());
}

PagedTensor::PagedTensor(
    DataType dtype, int num_kv_heads, int key_dim, int value_dim, int64_t num_entries) {
  view_.num_entries = num_entries;
  view_.dtype = dtype;
  view_.num_kv_heads = num_kv_heads;
  view_.key_dim = key_dim;
  view_.value_dim = value_dim;
  for (int64_t page = 0; page < divide_up(num_entries, kPageTokens); ++page) {
    auto buffer = Buffer::allocate(view_.page_bytes());
    LONGSPAN_CHECK(buffer.ok());
    for (size_t i = 0; i < view_.page_bytes() / size_of(dtype); ++i) {
      store_element(dtype, buffer->data(), i, std::numeric_limits<float>::quiet_NaN());
    }
    page_pointers_.push_back(buffer->data());
    pages_.push_back(*std::move(buffer));
  }
  view_.pages = page_pointers_.data();
}

PagedTensor::PagedTensor(DataType dtype,
                         int num_kv_heads,
                         int key_dim,
                         int value_dim,
                         const std::vector<float>& keys,
                         const std::vector<float>& values)
    : PagedTensor(dtype,
                  num_kv_heads,
                  key_dim,
                  value_dim,
                  static_cast<int64_t>(keys.size()) / (int64_t{num_kv_heads} * key_dim)) {
  size_t next_key = 0;
  size_t next_value = 0;
  for (int64_t entry = 0; entry < view_.num_entries; ++entry) {
    for (int head = 0; head < num_kv_heads; ++head) {
      for (int channel = 0; channel < key_dim; ++channel) {
        set_key(entry, head, channel, keys[next_key++]);
      }
      for (int channel = 0; channel < value_dim; ++channel) {
        set_value(entry, head, channel, values[next_value++]);
      }
    }
  }
}

float PagedTensor::key(int64_t entry, int kv_head, int channel) const {
  return load_element(view_.dtype, view_.key(entry, kv_head), static_cast<size_t>(channel));
}

float PagedTensor::value(int64_t entry, int kv_head, int channel) const {
  return load_element(view_.dtype, view_.value(entry, kv_head), static_cast<size_t>(channel));
}

void PagedTensor::set_key(int64_t entry, int kv_head, int channel, float value) {
  store_element(view_.dtype,
                const_cast<std::byte*>(view_.key(entry, kv_head)),
                static_cast<size_t>(channel),
                value);
}

void PagedTensor::set_value(int64_t entry, int kv_head, int channel, float value) {
  store_element(view_.dtype,
                const_cast<std::byte*>(view_.value(entry, kv_head)),
                static_cast<size_t>(channel),
                value);
}

}  // namespace longspan::testing
