// What the parts of cuda_prefill share: random elements, comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "bench/cuda_check_memory.h"
#include "kernels/cuda/convert.h"

namespace longspan::cuda {
namespace {

__global__ void fill_normal(
    DataType type, void* data, size_t count, float deviation, uint64_t seed) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    const uint64_t bits = mix(mix(seed) + i);
    const float u = (static_cast<float>(bits & 0xffffff) + 1.0F) / 16777216.0F;
    const float v = static_cast<float>((bits >> 24) & 0xffffff) / 16777216.0F;
    store_as(type, data, i, deviation * sqrtf(-2.0F * logf(u)) * cospif(2.0F * v));
  }
}

void fill(DataType type, void* data, size_t count, float deviation, uint64_t seed) {
  fill_normal<<<2048, 256>>>(type, data, count, deviation, seed);
}

float element(DataType type, const std::vector<uint16_t>& data, size_t index) {
  return load_element(type, data.data(), index);
}

// Compares, and prints the first and the worst mismatch. A NaN where none is expected, or none
// where one is, is a mismatch.
bool compare(const char* what,
             const std::vector<double>& expected,
             const std::vector<float>& got,
             int columns,
             double absolute,
             double relative) {
  size_t bad = 0;
  size_t first = 0;
  size_t worst = 0;
  double worst_error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double e = expected[i];
    const double g = got[i];
    double error = std::fabs(e - g);
    if ((std::isnan(e) && std::isnan(g)) || (std::isinf(e) && e == g)) {
      error = 0;
    } else if (!std::isfinite(e) || !std::isfinite(g)) {
      error = INFINITY;
    }
    if (error > absolute + relative * std::fabs(e)) {
      first = bad++ == 0 ? i : first;
    }
    if (error > worst_error) {
      worst = i;
      worst_error = error;
    }
  }
  if (bad > 0) {
    std::printf(
        "  %s: %zu of %zu wrong; first at row %zu column %zu: got %g expected %g; worst at "
        "row %zu column %zu: got %g expected %g\n",
        what,
        bad,
        expected.size(),
        first / columns,
        first % columns,
        static_cast<double>(got[first]),
        expected[first],
        worst / columns,
        worst % columns,
        static_cast<double>(got[worst]),
        expected[worst]);
  }
  return bad == 0;
}

}  // namespace
}  // namespace longspan::cuda
