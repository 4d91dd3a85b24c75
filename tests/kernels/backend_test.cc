#include "kernels/backend.h"

#include <cstdlib>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace longspan {
namespace {

using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

#ifdef LONGSPAN_CUDA
TEST(Backends, CudaNamesAnUnknownChoiceOfKernels) {
  ::setenv("LONGSPAN_CUDA_KERNELS", "nosuch", /*overwrite=*/1);
  const auto backend = make_backend("cuda", {});
  ::unsetenv("LONGSPAN_CUDA_KERNELS");
  ASSERT_TRUE(backend.ok()) << backend.status();
  const Status status = (*backend)->supports({.key_dim = 64, .value_dim = 64});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("LONGSPAN_CUDA_KERNELS"));
}
#endif

TEST(Backends, AreMadeByName) {
#ifdef LONGSPAN_CUDA
  EXPECT_THAT(backend_names(), UnorderedElementsAre("cuda", "reference", "simd"));
#else
  EXPECT_THAT(backend_names(), UnorderedElementsAre("reference", "simd"));
#endif
  for (const std::string& name : backend_names()) {
    const auto backend = make_backend(name, {.num_threads = 2});
    ASSERT_TRUE(backend.ok()) << backend.status();
    EXPECT_EQ((*backend)->name(), name);
    EXPECT_FALSE((*backend)->detail().empty());
  }
}

TEST(Backends, UnknownNameListsTheKnownOnes) {
  const Status status = make_backend("abacus", {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("simd, reference"));
}

TEST(Backends, NeedAThread) {
  EXPECT_EQ(make_backend("reference", {.num_threads = 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace longspan
