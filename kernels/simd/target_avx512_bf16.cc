// AVX-512 with dot products of bf16 pairs, for which Debian's Highway (1.0.3) has no target: the
// AVX-512 one, with the instruction allowed in our own functions.
#define HWY_COMPILE_ONLY_STATIC
#define HWY_BASELINE_TARGETS HWY_AVX3
#define LONGSPAN_SIMD_BF16_DOT

#include "kernels/simd/target-inl.h"

namespace longspan::simd {

const Target& avx512_bf16_target() {
  static constexpr Target kTarget = make_target("avx512bf16", "AVX-512 BF16");
  return kTarget;
}

}  // namespace longspan::simd
