// The comparison must be able to fail, or every test that uses it proves nothing.
#include "tests/support/compare.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

#include "tests/support/cases.h"

namespace longspan::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
const Tolerance kTolerance{1e-3, 1e-3};
using Floats = std::vector<float>;

TEST(Compare, AcceptsWhatIsEqualAndWhatIsClose) {
  EXPECT_TRUE(
      outputs_match(Floats{1.0F, kInfinity, kNan}, Floats{1.0F, kInfinity, kNan}, 3, kTolerance));
  EXPECT_TRUE(outputs_match(Floats{1.0005F, 0.0F}, Floats{1.0F, 0.0F}, 2, kTolerance));
  EXPECT_TRUE(outputs_match(Floats{0.0F, 0.0F}, Floats{0.0F, 0.0F}, 2, kTolerance));
  EXPECT_TRUE(lse_match(Floats{-kInfinity, 10.0005F}, Floats{-kInfinity, 10.0F}, kTolerance));
}

TEST(Compare, RefusesNanWhereTheReferenceIsANumber) {
  EXPECT_FALSE(outputs_match(Floats{1.0F, kNan}, Floats{1.0F, 1.0F}, 2, kTolerance));
  EXPECT_FALSE(outputs_match(Floats{1.0F, 1.0F}, Floats{1.0F, kNan}, 2, kTolerance));
  EXPECT_FALSE(lse_match(Floats{kNan}, Floats{0.0F}, kTolerance));
}

TEST(Compare, RefusesInfinitiesInTheWrongPlaceOrOfTheWrongSign) {
  EXPECT_FALSE(outputs_match(Floats{kInfinity}, Floats{1.0F}, 1, kTolerance));
  EXPECT_FALSE(outputs_match(Floats{kInfinity}, Floats{-kInfinity}, 1, kTolerance));
  EXPECT_FALSE(lse_match(Floats{-kInfinity}, Floats{-80.0F}, kTolerance));
}

TEST(Compare, RefusesErrorsBeyondTheTolerance) {
  EXPECT_FALSE(outputs_match(Floats{1.002F, 0.0F}, Floats{1.0F, 0.0F}, 2, kTolerance));
  EXPECT_FALSE(outputs_match(Floats{0.1F}, Floats{0.0F}, 1, kTolerance));
  EXPECT_FALSE(lse_match(Floats{10.002F}, Floats{10.0F}, kTolerance));
  EXPECT_FALSE(outputs_match(Floats{1.0F}, Floats{1.0F, 1.0F}, 1, kTolerance));
}

TEST(Compare, OneWrongRowCannotHideAmongMany) {
  std::vector<float> reference(100000, 1.0F);
  std::vector<float> out = reference;
  out[5000] = 1.05F;
  // Over everything the error is 1.6e-4, below the tolerance.
  EXPECT_FALSE(outputs_match(out, reference, 10, kTolerance));
}

TEST(Cases, PagesHoldWhatWasWrittenAndPoisonElsewhere) {
  Random random(1);
  for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    std::vector<float> keys = random.normals(65 * 2 * 3);
    std::vector<float> values = random.normals(65 * 2 * 5);
    round_to(dtype, keys);
    round_to(dtype, values);
    const PagedTensor tensor(dtype, 2, 3, 5, keys, values);
    EXPECT_EQ(tensor.view().num_entries, 65);
    EXPECT_EQ(tensor.key(64, 1, 2), keys[64 * 6 + 1 * 3 + 2]);
    EXPECT_EQ(tensor.value(64, 1, 4), values[64 * 10 + 1 * 5 + 4]);
    EXPECT_TRUE(std::isnan(tensor.key(65, 0, 0)));
    EXPECT_TRUE(std::isnan(tensor.value(127, 1, 4)));
  }
}

}  // namespace
}  // namespace longspan::testing
