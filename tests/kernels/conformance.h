// The conformance suite: each target of the simd backend against the reference backend.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>

#include "gtest/gtest.h"

#include "kernels/backend.h"
#include "kernels/reference/backend.h"
#include "kernels/simd/backend.h"
#include "tests/support/cases.h"
#include "tests/support/compare.h"

namespace longspan::testing {

// Parameter: the name of a target. Skips, saying so, where this machine does not run it.
class Conformance : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!backend(1)->supports(Problem{.key_dim = 64, .value_dim = 64}).ok()) {
      GTEST_SKIP() << "this machine does not run " << GetParam();
    }
  }

  std::unique_ptr<Backend> backend(int num_threads) const {
    ::setenv("LONGSPAN_SIMD_TARGET", GetParam().c_str(), /*overwrite=*/1);
    auto made = make_simd_backend(BackendOptions{.num_threads = num_threads});
    ::unsetenv("LONGSPAN_SIMD_TARGET");
    return made;
  }
  std::unique_ptr<Backend> reference() const { return make_reference_backend(BackendOptions{}); }

  // Streams differ by target and by the test's own salt.
  Random random(uint64_t salt) const {
    return Random(salt * 1000 + std::hash<std::string>()(GetParam()));
  }
  Stream stream_;
};

inline const auto kAllTargets = ::testing::Values("avx2", "avx512", "avx512bf16");
inline std::string target_name(const ::testing::TestParamInfo<std::string>& info) {
  return info.param;
}

}  // namespace longspan::testing
