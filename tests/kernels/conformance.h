// The conformance suite: each target of the simd backend, and the CUDA backend in a build with it,
// against the reference backend.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/backend.h"
#include "kernels/reference/backend.h"
#include "kernels/simd/backend.h"
#include "tests/support/cases.h"
#include "tests/support/compare.h"
#ifdef LONGSPAN_CUDA
#include "tests/support/cuda_backend.h"
#endif

namespace longspan::testing {

// Parameter: the name of a target of the simd backend, or "cuda". Skips, with the reason, where
// this machine does not run it.
class Conformance : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const Status status = backend(1)->supports(Problem{.key_dim = 64, .value_dim = 64});
    if (!status.ok()) {
      GTEST_SKIP() << "this machine does not run " << GetParam() << ": " << status;
    }
  }

  std::unique_ptr<Backend> backend(int num_threads) const {
#ifdef LONGSPAN_CUDA
    if (GetParam().starts_with("cuda")) {
      const size_t underscore = GetParam().find('_');
      const std::string kernels =
          underscore == std::string::npos ? "all" : GetParam().substr(underscore + 1);
      ::setenv("LONGSPAN_CUDA_KERNELS", kernels.c_str(), /*overwrite=*/1);
      auto made = make_cuda_test_backend();
      ::unsetenv("LONGSPAN_CUDA_KERNELS");
      return made;
    }
#endif
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

inline const std::vector<std::string> kTargets = {
    "avx2",
    "avx512",
    "avx512bf16",
#ifdef LONGSPAN_CUDA
    "cuda",
    "cuda_portable",
    "cuda_decode",
    "cuda_tiles",
#endif
};
inline const auto kAllTargets = ::testing::ValuesIn(kTargets);
inline std::string target_name(const ::testing::TestParamInfo<std::string>& info) {
  return info.param;
}

}  // namespace longspan::testing
