#include "client/cli/random_rows.h"

#include <random>

namespace longspan::cli {
namespace {

// Elements are drawn from so many samples: 16 bits of a random number each.
constexpr size_t kNumSamples = size_t{1} << 16;

template <typename Element, typename Convert>
void fill(std::string& storage, const std::vector<float>& normals, auto next, Convert convert) {
  std::vector<Element> table(normals.size());
  for (size_t index = 0; index < table.size(); ++index) {
    table[index] = convert(normals[index]);
  }
  auto* elements = reinterpret_cast<Element*>(storage.data());
  const size_t count = storage.size() / sizeof(Element);
  uint64_t bits = 0;
  for (size_t index = 0; index < count; ++index) {
    bits = index % 4 == 0 ? next() : bits >> 16;
    elements[index] = table[bits % kNumSamples];
  }
}

}  // namespace

RandomRows::RandomRows(uint64_t seed) : state_(seed), normals_(kNumSamples) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> normal;
  for (float& sample : normals_) {
    do {
      sample = normal(generator);
    } while (float_to_float16(sample) << 1 == 0);  // zero in some type
  }
}

// SplitMix64.
uint64_t RandomRows::next() {
  state_ += 0x9e3779b97f4a7c15ULL;
  uint64_t mixed = state_;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9ULL;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebULL;
  return mixed ^ (mixed >> 31);
}

client::Rows RandomRows::make(
    std::string& storage, DataType dtype, int64_t num_tokens, int64_t num_heads, int64_t dim) {
  client::Rows rows{.dtype = dtype, .num_tokens = num_tokens, .num_heads = num_heads, .dim = dim};
  storage.resize(static_cast<size_t>(num_tokens * rows.row_bytes()));
  const auto draw = [this] { return next(); };
  switch (dtype) {
    case DataType::kFloat32:
      fill<float>(storage, normals_, draw, [](float value) { return value; });
      break;
    case DataType::kFloat16:
      fill<uint16_t>(storage, normals_, draw, float_to_float16);
      break;
    case DataType::kBFloat16:
      fill<uint16_t>(storage, normals_, draw, float_to_bfloat16);
      break;
  }
  rows.data = storage.data();
  return rows;
}

}  // namespace longspan::cli
