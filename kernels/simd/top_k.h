// The k best candidates of a row, by higher score and then lower id.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>

namespace longspan::simd {

// A candidate in one number, so that better candidates are larger: the score's bits, brought into
// order, above the inverted id. NaN counts as -inf, and -0 as 0.
class Candidate {
 public:
  static uint64_t pack(float score, uint64_t id) {
    const float ordered =
        std::isnan(score) ? -std::numeric_limits<float>::infinity() : score + 0.0F;
    const auto bits = std::bit_cast<uint32_t>(ordered);
    const uint32_t key = (bits & kSign) != 0 ? ~bits : bits | kSign;
    return (uint64_t{key} << 32) | (~id & 0xffffffffU);
  }
  static float score(uint64_t packed) {
    const auto key = static_cast<uint32_t>(packed >> 32);
    return std::bit_cast<float>((key & kSign) != 0 ? key ^ kSign : ~key);
  }
  static int64_t id(uint64_t packed) { return static_cast<int64_t>(~packed & 0xffffffffU); }

 private:
  static constexpr uint32_t kSign = 0x80000000U;
};

// Collects candidates in the caller's memory. Those offered must come with rising ids, so that of
// equal scores the first one stays.
class TopK {
 public:
  // Places that collecting k needs: room to gather before the worst are dropped.
  static constexpr int64_t capacity(int64_t k) { return 2 * k + 64; }

  void start(int64_t k, uint64_t* places) {
    k_ = k;
    places_ = places;
    count_ = 0;
    threshold_ = -std::numeric_limits<float>::infinity();
    full_ = false;
  }
  // Scores that are not above it need not be offered, once full().
  float threshold() const { return threshold_; }
  bool full() const { return full_; }
  int64_t count() const { return count_; }
  const uint64_t* candidates() const { return places_; }

  void offer(float score, int64_t id) { offer(Candidate::pack(score, static_cast<uint64_t>(id))); }
  void offer(uint64_t candidate) {
    if (k_ == 0) {
      return;
    }
    places_[count_++] = candidate;
    if (count_ == capacity(k_)) {
      drop_worst();
    }
  }

  // Leaves the best ones, best first.
  void finish() {
    drop_worst();
    std::sort(places_, places_ + count_, std::greater<>());
  }

 private:
  void drop_worst() {
    if (count_ < k_ || k_ == 0) {
      return;
    }
    std::nth_element(places_, places_ + k_ - 1, places_ + count_, std::greater<>());
    count_ = k_;
    threshold_ = Candidate::score(places_[k_ - 1]);
    full_ = true;
  }

  int64_t k_ = 0;
  uint64_t* places_ = nullptr;  // [capacity(k)]
  int64_t count_ = 0;
  float threshold_ = 0.0F;
  bool full_ = false;
};

}  // namespace longspan::simd
