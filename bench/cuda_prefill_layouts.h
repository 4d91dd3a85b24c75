// Checks of the layouts that attention of many rows relies on, one by one: what TMA brings, the
// operands and the results of wgmma.
#pragma once

#include "bench/cuda_prefill_support.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/tensor_map.h"

namespace longspan::cuda {
namespace {

constexpr int kLayoutThreads = 128;

// One tile, step by step: what TMA brought, S = Q K^T, O = P V with P = S / 8 rounded to T.
template <class T, int kKeyDim, int kValueDim, int kPages>
__global__ void __launch_bounds__(kLayoutThreads)
    layout_kernel(const __grid_constant__ CUtensorMap key_map,
                  const __grid_constant__ CUtensorMap value_map,
                  const T* query,         // [64][D]
                  const int32_t* places,  // [pages][4]: row, plane of keys; row, plane of values
                  uint16_t* key_tile,     // what lies in shared memory
                  float* scores,          // [64][64 * pages]
                  float* out) {           // [64][E]
  constexpr int kTokens = kPages * 64;
  constexpr int kPlaneBytes = kTokens * 128;
  constexpr int kKeyPlanes = kKeyDim / 64;
  constexpr int kValuePlanes = kValueDim / 64;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* queries = shared;
  uint8_t* keys = queries + kKeyPlanes * 64 * 128;
  uint8_t* values = keys + kKeyPlanes * kPlaneBytes;
  __shared__ uint64_t barrier_word;
  const uint32_t barrier = ptx::shared_address(&barrier_word);
  const int thread = threadIdx.x;
  if (thread == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init_fence();
  }
  for (int i = thread; i < 64 * kKeyDim / 8; i += kLayoutThreads) {
    const int row = i / (kKeyDim / 8);
    const int chunk = i % (kKeyDim / 8);
    const uint8_t* place =
        queries + (chunk / 8) * 64 * 128 + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
    ptx::copy_async_16(ptx::shared_address(place), query + row * kKeyDim + chunk * 8);
  }
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  ptx::fence_async_shared();
  __syncthreads();
  if (thread == 0) {
    for (int page = 0; page < kPages; ++page) {
      for (int plane = 0; plane < kKeyPlanes; ++plane) {
        ptx::copy_tensor_3d(ptx::shared_address(keys + plane * kPlaneBytes + page * 64 * 128),
                            &key_map,
                            barrier,
                            0,
                            places[4 * page],
                            places[4 * page + 1] + plane,
                            ptx::kEvictLast);
      }
      for (int plane = 0; plane < kValuePlanes; ++plane) {
        ptx::copy_tensor_3d(ptx::shared_address(values + plane * kPlaneBytes + page * 64 * 128),
                            &value_map,
                            barrier,
                            0,
                            places[4 * page + 2],
                            places[4 * page + 3] + plane,
                            ptx::kEvictLast);
      }
    }
    ptx::barrier_arrive_expect(barrier, (kKeyPlanes + kValuePlanes) * kPlaneBytes);
  }
  ptx::barrier_wait(barrier, 0);
  for (int i = thread; i < kTokens * kKeyDim; i += kLayoutThreads) {
    key_tile[i] = reinterpret_cast<const uint16_t*>(keys)[i];
  }

  float s[kTokens / 2];
  const uint64_t query_tile = ptx::wgmma_descriptor(ptx::shared_address(queries), 0);
  const uint64_t key_operand = ptx::wgmma_descriptor(ptx::shared_address(keys), 0);
  const uint64_t value_operand = ptx::wgmma_descriptor(ptx::shared_address(values), kPlaneBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kKeyDim / 16; ++k) {
    ptx::wgmma_m64k16<false>(T{},
                             s,
                             ptx::wgmma_advance(query_tile, k / 4 * 64 * 128 + k % 4 * 32),
                             ptx::wgmma_advance(key_operand, k / 4 * kPlaneBytes + k % 4 * 32),
                             k > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(s);
  const int row = thread / 32 * 16 + thread % 32 / 4;
  uint32_t p[kTokens / 16][4];
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scores[(row + j / 2 * 8) * kTokens + 8 * i + 2 * (thread % 4) + j % 2] = s[4 * i + j];
    }
    p[i / 2][i % 2 * 2] = ptx::pack<T>(s[4 * i] / 8, s[4 * i + 1] / 8);
    p[i / 2][i % 2 * 2 + 1] = ptx::pack<T>(s[4 * i + 2] / 8, s[4 * i + 3] / 8);
  }
  constexpr int kBlock = kValueDim < 128 ? kValueDim : 128;
  float o[kValueDim / kBlock][kBlock / 2] = {};
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
    for (int block = 0; block < kValueDim / kBlock; ++block) {
      ptx::wgmma_m64k16<true>(T{},
                              o[block],
                              p[k],
                              ptx::wgmma_advance(value_operand, block * 2 * kPlaneBytes + k * 2048),
                              true);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < kValueDim / kBlock; ++block) {
    ptx::wgmma_pin(o[block]);
#pragma unroll
    for (int i = 0; i < kBlock / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out[(row + j / 2 * 8) * kValueDim + block * kBlock + 8 * i + 2 * (thread % 4) + j % 2] =
            o[block][4 * i + j];
      }
    }
  }
}

template <class T, int kKeyDim, int kValueDim, int kPages>
bool check_layout(DataType type, uint64_t seed) {
  constexpr int kTokens = kPages * 64;
  constexpr int kHeads = 2;
  constexpr int kHead = 1;
  constexpr int kArenaPages = 5;
  constexpr size_t kPageElements = kHeads * 64 * (kKeyDim + kValueDim);
  const size_t page_of[] = {3, 1};
  Memory<uint16_t> arena(kArenaPages * kPageElements);
  Memory<uint16_t> query(64 * kKeyDim);
  fill(type, arena.data(), arena.size(), 1.0F, seed);
  fill(type, query.data(), query.size(), 1.0F, seed + 1);
  std::vector<int32_t> places;
  for (int page = 0; page < kPages; ++page) {
    const size_t key = (page_of[page] * kPageElements + kHead * 64 * kKeyDim) * 2;
    const size_t value =
        (page_of[page] * kPageElements + kHeads * 64 * kKeyDim + kHead * 64 * kValueDim) * 2;
    places.insert(places.end(),
                  {static_cast<int32_t>(key / (2 * kKeyDim)),
                   static_cast<int32_t>(key % (2 * kKeyDim) / 128),
                   static_cast<int32_t>(value / (2 * kValueDim)),
                   static_cast<int32_t>(value % (2 * kValueDim) / 128)});
  }
  Memory<int32_t> device_places(places);
  Memory<uint16_t> tile(kTokens * kKeyDim);
  Memory<float> scores(64 * kTokens);
  Memory<float> out(64 * kValueDim);
  tile.poison();
  scores.poison();
  out.poison();
  CUtensorMap key_map;
  CUtensorMap value_map;
  const size_t bytes = arena.size() * 2;
  if (!succeeded(make_page_map(&key_map, arena.data(), bytes, type, kKeyDim, 64, 1), "key map") ||
      !succeeded(make_page_map(&value_map, arena.data(), bytes, type, kValueDim, 64, 1),
                 "value map")) {
    return false;
  }
  const auto kernel = layout_kernel<T, kKeyDim, kValueDim, kPages>;
  constexpr int kShared = 64 * kKeyDim * 2 + kTokens * (kKeyDim + kValueDim) * 2;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  kernel<<<1, kLayoutThreads, kShared>>>(key_map,
                                         value_map,
                                         reinterpret_cast<const T*>(query.data()),
                                         device_places.data(),
                                         tile.data(),
                                         scores.data(),
                                         out.data());
#ifdef LONGSPAN_CUDA_SPIN_LIMIT
  ptx::report_spin("layout_kernel");
#endif
  if (!succeeded(cudaDeviceSynchronize(), "layout kernel")) {
    return false;
  }

  const auto k = arena.host();
  const auto q = query.host();
  const auto got_scores = scores.host();
  const auto got_tile = tile.host();
  std::vector<double> expected_tile(kTokens * kKeyDim);
  std::vector<float> tile_values(kTokens * kKeyDim);
  std::vector<double> expected_scores(64 * kTokens);
  std::vector<double> expected_out(64 * kValueDim);
  for (int token = 0; token < kTokens; ++token) {
    const size_t page = page_of[token / 64] * kPageElements;
    const size_t key = page + (kHead * 64 + token % 64) * kKeyDim;
    const size_t value = page + kHeads * 64 * kKeyDim + (kHead * 64 + token % 64) * kValueDim;
    for (int d = 0; d < kKeyDim; ++d) {
      const int chunk = d % 64 / 8;
      const int place = d / 64 * kTokens * 64 + token * 64 + (chunk ^ (token % 8)) * 8 + d % 8;
      expected_tile[place] = element(type, k, key + d);
      tile_values[place] = element(type, got_tile, place);
    }
    for (int row = 0; row < 64; ++row) {
      double dot = 0;
      for (int d = 0; d < kKeyDim; ++d) {
        dot += static_cast<double>(element(type, q, row * kKeyDim + d)) * element(type, k, key + d);
      }
      expected_scores[row * kTokens + token] = dot;
      // From the device's own scores, so that a fault of theirs does not show here too.
      uint16_t weight = 0;
      store_element(type, &weight, 0, got_scores[row * kTokens + token] / 8);
      for (int e = 0; e < kValueDim; ++e) {
        expected_out[row * kValueDim + e] +=
            static_cast<double>(load_element(type, &weight, 0)) * element(type, k, value + e);
      }
    }
  }
  const bool tile_ok = compare("TMA tile", expected_tile, tile_values, 64, 0, 0);
  const bool scores_ok = compare("scores", expected_scores, got_scores, kTokens, 1e-3, 1e-4);
  const bool out_ok = compare("values", expected_out, out.host(), kValueDim, 1e-2, 1e-3);
  std::printf("%s layout %s D %d E %d pages %d: TMA %s, scores %s, values %s\n",
              tile_ok && scores_ok && out_ok ? "PASS" : "FAIL",
              type == DataType::kFloat16 ? "fp16" : "bf16",
              kKeyDim,
              kValueDim,
              kPages,
              tile_ok ? "ok" : "WRONG",
              scores_ok ? "ok" : "WRONG",
              out_ok ? "ok" : "WRONG");
  return tile_ok && scores_ok && out_ok;
}

int check_layouts(uint64_t seed) {
  int failures = 0;
  failures += !check_layout<__nv_bfloat16, 64, 64, 1>(DataType::kBFloat16, seed);
  failures += !check_layout<__nv_bfloat16, 128, 128, 1>(DataType::kBFloat16, seed);
  failures += !check_layout<__nv_bfloat16, 128, 128, 2>(DataType::kBFloat16, seed);
  failures += !check_layout<__nv_bfloat16, 192, 128, 2>(DataType::kBFloat16, seed);
  failures += !check_layout<__nv_bfloat16, 256, 256, 1>(DataType::kBFloat16, seed);
  failures += !check_layout<__half, 128, 128, 2>(DataType::kFloat16, seed);
  return failures;
}

}  // namespace
}  // namespace longspan::cuda
