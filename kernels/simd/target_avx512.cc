// AVX-512 F, VL, DQ and BW.
#define HWY_COMPILE_ONLY_STATIC
#define HWY_BASELINE_TARGETS HWY_AVX3

#include "kernels/simd/target-inl.h"

namespace longspan::simd {

const Target& avx512_target() {
  static constexpr Target kTarget = make_target("avx512", "AVX-512");
  return kTarget;
}

}  // namespace longspan::simd
