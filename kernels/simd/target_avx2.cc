// AVX2 with FMA and F16C.
#define HWY_COMPILE_ONLY_STATIC
#define HWY_BASELINE_TARGETS HWY_AVX2

#include "kernels/simd/target-inl.h"

namespace longspan::simd {

const Target& avx2_target() {
  static constexpr Target kTarget = make_target("avx2", "AVX2");
  return kTarget;
}

}  // namespace longspan::simd
