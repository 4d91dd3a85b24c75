// One seeded Case shared by tests and benchmarks: the shape of a context, its method and its
// numbers, and the paged and poisoned memory that they are tried in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "base/data_type.h"
#include "base/device.h"
#include "kernels/method.h"
#include "kernels/params.h"

namespace longspan::testing {

// The seed of this run: a fresh one, printed, or $LONGSPAN_TEST_SEED. The same for the whole
// process, so that a failure names all that it takes to see it again.
uint64_t test_seed();

// Numbers for one purpose: streams with different salts are independent.
class Random {
 public:
  explicit Random(uint64_t salt) : engine_(test_seed() * 0x9e3779b97f4a7c15ULL + salt) {}

  int64_t between(int64_t low, int64_t high) {  // both included
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }
  float normal(float deviation = 1.0F) {
    return std::normal_distribution<float>(0.0F, deviation)(engine_);
  }
  std::vector<float> normals(size_t count, float deviation = 1.0F) {
    std::vector<float> values(count);
    for (float& value : values) {
      value = normal(deviation);
    }
    return values;
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// The last `num_rows` positions of a context of `num_tokens` are its queries: row t is at position
// num_tokens - num_rows + t and sees the tokens up to its own.
struct Case {
  std::string name;
  int num_query_heads = 4;  // H
  int num_kv_heads = 2;     // G
  int key_dim = 64;         // D
  int value_dim = 64;       // E
  DataType dtype = DataType::kBFloat16;
  int64_t num_tokens = 0;
  int64_t num_rows = 1;
  float scale = 0.0F;  // 0: 1 / sqrt(D)
  float soft_cap = 0.0F;
  Method method = {};

  float attention_scale() const;
  int64_t first_position() const { return num_tokens - num_rows; }
};
std::ostream& operator<<(std::ostream& stream, const Case& test_case);

// The numbers of a case. Keys and values are rounded to its type already.
struct CaseTensors {
  std::vector<float> query;         // [rows][H][D]
  std::vector<float> search_query;  // [rows][H][D]
  std::vector<float> gates;         // [rows][H][branches], in (0, 1)
  std::vector<float> keys;          // [tokens][G][D]
  std::vector<float> values;        // [tokens][G][E]
};
CaseTensors make_tensors(const Case& test_case, Random& random);

// Values as a cache of `dtype` would give them back.
void round_to(DataType dtype, std::vector<float>& values);

// Elements of `dtype`, as a client sends them.
std::vector<std::byte> encode(DataType dtype, const std::vector<float>& values);

// Float memory that no computation has touched: NaN throughout.
std::vector<float> poisoned(size_t count);

// Entries in pages of their own, what is not written poisoned with NaN.
class PagedTensor {
 public:
  PagedTensor() = default;
  // keys [n][G][D], values [n][G][E] (empty when E is 0).
  PagedTensor(DataType dtype,
              int num_kv_heads,
              int key_dim,
              int value_dim,
              const std::vector<float>& keys,
              const std::vector<float>& values);
  // Room for `num_entries`, all poison.
  PagedTensor(DataType dtype, int num_kv_heads, int key_dim, int value_dim, int64_t num_entries);

  const PagedView& view() const { return view_; }
  float key(int64_t entry, int kv_head, int channel) const;
  float value(int64_t entry, int kv_head, int channel) const;
  void set_key(int64_t entry, int kv_head, int channel, float value);
  void set_value(int64_t entry, int kv_head, int channel, float value);

 private:
  std::vector<Buffer> pages_;
  std::vector<const std::byte*> page_pointers_;
  PagedView view_;  // of page_pointers_, whose memory moves with the vector
};

}  // namespace longspan::testing
