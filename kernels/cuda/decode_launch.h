// Host code of split-KV decode: launches that the kernels share.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/decode_shape.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/params.h"

namespace longspan::cuda::decode {

struct LaunchShape {
  int64_t num_blocks = 0;
  int num_threads = 0;
  size_t shared_bytes = 0;
  int cluster_size = 1;
};

// A launch that may begin before the one in front of it has ended. Its configuration points to its
// attributes, so it stays where it was made.
class DependentLaunch {
 public:
  DependentLaunch(const LaunchShape& shape, cudaStream_t stream) {
    attributes_[0].id = cudaLaunchAttributeClusterDimension;
    attributes_[0].val.clusterDim.x = static_cast<unsigned int>(shape.cluster_size);
    attributes_[0].val.clusterDim.y = 1;
    attributes_[0].val.clusterDim.z = 1;
    attributes_[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[1].val.programmaticStreamSerializationAllowed = 1;
    config_.gridDim = dim3(static_cast<unsigned int>(shape.num_blocks));
    config_.blockDim = dim3(static_cast<unsigned int>(shape.num_threads));
    config_.dynamicSmemBytes = shape.shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    config_.numAttrs = 2;
  }
  DependentLaunch(const DependentLaunch&) = delete;
  DependentLaunch& operator=(const DependentLaunch&) = delete;

  // The same shape without the dependency.
  cudaLaunchConfig_t independent_config() const {
    cudaLaunchConfig_t config = config_;
    config.numAttrs = 1;
    return config;
  }

  template <typename... Parameters, typename... Arguments>
  cudaError_t run(void (*kernel)(Parameters...), Arguments&&... arguments) const {
    return cudaLaunchKernelEx(&config_, kernel, arguments...);
  }

 private:
  cudaLaunchAttribute attributes_[2] = {};
  cudaLaunchConfig_t config_ = {};
};

// A map whose boxes are `rows` tokens of keys or values of size `dim`.
inline cudaError_t make_map(const PagedView& kv, int dim, int rows, int planes, CUtensorMap& map) {
  return make_page_map(&map, kv.arena, kv.arena_bytes, kv.dtype, dim, rows, planes);
}

inline DecodeShape decode_shape(const AttendParams& params, bool contexts_of_rows) {
  DecodeShape shape;
  shape.num_rows = params.num_rows;
  shape.num_query_heads = params.num_query_heads;
  shape.num_kv_heads = params.kv.num_kv_heads;
  shape.num_selection_heads = params.num_selection_heads;
  shape.one_row_a_page = params.num_rows == 1 || contexts_of_rows;
  return shape;
}

// Null, or why no kernel of split-KV decode can do it.
inline const char* declines(const AttendParams& params) {
  const PagedView& kv = params.kv;
  const bool known_dims = (kv.key_dim == kv.value_dim &&
                           (kv.key_dim == 64 || kv.key_dim == 128 || kv.key_dim == 256)) ||
                          (kv.key_dim == 192 && kv.value_dim == 128);
  if (!known_dims) {
    return "head sizes other than 64, 128, 256 and 192 with 128";
  }
  if (kv.dtype == DataType::kFloat32) {
    return "an fp32 cache";
  }
  if (params.query_dtype != DataType::kFloat32 && params.query_dtype != kv.dtype) {
    return "queries of another 16-bit type than the cache";
  }
  if (reinterpret_cast<uintptr_t>(params.query) % 16 != 0) {
    return "queries that are not aligned to 16 bytes";
  }
  if (kv.arena == nullptr) {
    return "pages without an arena";
  }
  const int heads = item_heads(decode_shape(params, false)).heads_per_item;
  if (heads > kMaxHeadsPerItem) {
    return "more than 32 query heads a KV head";
  }
  if (kv.key_dim == 256 && heads > kMaxHeadsPerItem / 2) {
    return "more than 16 query heads a KV head of size 256";
  }
  return nullptr;
}

template <typename T, int kHeadTiles, int kSets, class Function>
cudaError_t with_dims(int key_dim, Function&& function) {
  switch (key_dim) {
    case 64:
      return function(Shape<T, 64, 64, kHeadTiles, kSets>{});
    case 128:
      return function(Shape<T, 128, 128, kHeadTiles, kSets>{});
    case 192:
      return function(Shape<T, 192, 128, kHeadTiles, kSets>{});
    default:
      break;
  }
  if constexpr (kSets == 1) {
    return function(Shape<T, 256, 256, kHeadTiles, kSets>{});
  } else {
    return cudaErrorNotSupported;
  }
}

template <typename T, class Function>
cudaError_t with_head_tiles(const ItemHeads& heads, int key_dim, Function&& function) {
  if (heads.heads_per_tile == 8) {
    return with_dims<T, 1, 1>(key_dim, function);
  }
  return heads.num_head_sets == 1 ? with_dims<T, 2, 1>(key_dim, function)
                                  : with_dims<T, 2, 2>(key_dim, function);
}

// Calls `function` with the Shape of the problem.
template <class Function>
cudaError_t with_shape(const PagedView& kv, const ItemHeads& heads, Function&& function) {
  return kv.dtype == DataType::kFloat16
             ? with_head_tiles<__half>(heads, kv.key_dim, function)
             : with_head_tiles<__nv_bfloat16>(heads, kv.key_dim, function);
}

}  // namespace longspan::cuda::decode
