// Mutated messages against the decoders, without libFuzzer: a bounded number of inputs from a
// printed seed, meant for the sanitizers' build.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/fuzz/decode_target.h"

namespace longspan {
namespace {

constexpr int kDefaultInputs = 200'000;

int64_t number_from(const char* variable, int64_t fallback) {
  const char* text = std::getenv(variable);
  return text == nullptr ? fallback : std::strtoll(text, nullptr, 10);
}

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed), seeds_(decode_seeds()) {}

  std::vector<uint8_t> next() {
    std::vector<uint8_t> input = seeds_[below(seeds_.size())];
    for (size_t changes = 1 + below(6); changes > 0; --changes) {
      mutate(input);
    }
    return input;
  }

 private:
  size_t below(size_t bound) { return random_() % bound; }

  // The structure is near the front of most messages; tensors fill the rest.
  size_t place(const std::vector<uint8_t>& input) {
    return below(below(4) == 0 ? input.size() : std::min<size_t>(input.size(), 96));
  }

  void mutate(std::vector<uint8_t>& input) {
    if (input.size() < 2) {
      input.push_back(static_cast<uint8_t>(random_()));
      return;
    }
    const size_t at = place(input);
    const auto position = input.begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(6)) {
      case 0:  // another byte
        input[at] = static_cast<uint8_t>(random_());
        return;
      case 1:  // another bit
        input[at] ^= static_cast<uint8_t>(1U << below(8));
        return;
      case 2:  // a long number where a short one was
        input.insert(position, 1 + below(9), 0xff);
        return;
      case 3: {  // a piece less
        const size_t length = std::min(input.size() - at, 1 + below(64));
        input.erase(position, position + static_cast<std::ptrdiff_t>(length));
        return;
      }
      case 4: {  // a piece of another message
        const std::vector<uint8_t>& other = seeds_[below(seeds_.size())];
        const size_t begin = below(other.size());
        const size_t length = std::min(other.size() - begin, 1 + below(128));
        const auto source = other.begin() + static_cast<std::ptrdiff_t>(begin);
        input.insert(position, source, source + static_cast<std::ptrdiff_t>(length));
        return;
      }
      default:  // the end missing
        input.resize(1 + below(input.size()));
    }
  }

  std::mt19937 random_;
  std::vector<std::vector<uint8_t>> seeds_;
};

TEST(DecodeMutation, NothingCrashes) {
  const auto seed =
      static_cast<uint32_t>(number_from("LONGSPAN_TEST_SEED", std::random_device()()));
  const int64_t inputs = number_from("LONGSPAN_FUZZ_INPUTS", kDefaultInputs);
  std::printf("LONGSPAN_TEST_SEED=%u, %lld inputs\n", seed, static_cast<long long>(inputs));
  for (const std::vector<uint8_t>& input : decode_seeds()) {
    decode_anything(input);
  }
  Mutator mutator(seed);
  for (int64_t i = 0; i < inputs; ++i) {
    decode_anything(mutator.next());
  }
}

}  // namespace
}  // namespace longspan
