#include "kernels/simd/target.h"

#include <cstdlib>

#include "hwy/targets.h"

namespace longspan::simd {

const Target* choose_target() {
  const int64_t supported = hwy::SupportedTargets();
  const struct {
    const Target& target;
    bool runs_here;
  } targets[] = {
      {avx512_bf16_target(),
       (supported & HWY_AVX3) != 0 && __builtin_cpu_supports("avx512bf16") != 0},
      {avx512_target(), (supported & HWY_AVX3) != 0},
      {avx2_target(), (supported & HWY_AVX2) != 0},
  };
  const char* wanted = std::getenv("LONGSPAN_SIMD_TARGET");
  for (const auto& [target, runs_here] : targets) {
    if (runs_here && (wanted == nullptr || target.name == wanted)) {
      return &target;
    }
  }
  return nullptr;
}

}  // namespace longspan::simd
