#include "kernels/cuda/tensor_map.h"

#include <algorithm>

namespace longspan::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver at run time, so that nothing links against it. Null where it is missing.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    constexpr unsigned int kFirstVersion = 12000;
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &symbol, kFirstVersion, cudaEnableDefault, &result);
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<EncodeTiled>(symbol) : nullptr;
  }();
  return function;
}

constexpr cuuint64_t kPlaneBytes = 128;
constexpr cuuint32_t kPlaneElements = 64;

// Of elements of 16 bits, the innermost ones adjacent, in boxes of a plane's width.
cudaError_t make_map(CUtensorMap* map,
                     const void* base,
                     DataType dtype,
                     const cuuint64_t (&sizes)[3],
                     const cuuint64_t (&strides)[2],
                     const cuuint32_t (&box)[3]) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) {
    return cudaErrorNotSupported;
  }
  const cuuint32_t element_strides[] = {1, 1, 1};
  const CUresult result = encode(map,
                                 dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                 3,
                                 const_cast<void*>(base),
                                 sizes,
                                 strides,
                                 box,
                                 element_strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t make_page_map(CUtensorMap* map,
                          const void* arena,
                          size_t arena_bytes,
                          DataType dtype,
                          int dim,
                          int box_rows,
                          int box_planes) {
  const auto row_bytes = static_cast<cuuint64_t>(dim) * 2;
  const cuuint64_t planes = row_bytes / kPlaneBytes;
  // Twice the planes: a tile may begin at any plane of a row. What they name beyond the arena's
  // last row is never asked for.
  return make_map(
      map,
      arena,
      dtype,
      {kPlaneElements, arena_bytes / row_bytes, 2 * planes},
      {row_bytes, kPlaneBytes},
      {kPlaneElements, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_planes)});
}

cudaError_t make_query_map(CUtensorMap* map,
                           const void* query,
                           int64_t num_queries,
                           int num_heads,
                           DataType dtype,
                           int dim,
                           QueryBox box) {
  constexpr cuuint64_t kMaxBytes = cuuint64_t{1} << 40;
  constexpr cuuint64_t kMaxCount = INT32_MAX;  // coordinates are of 32 bits
  const auto head_bytes = static_cast<cuuint64_t>(dim) * 2;
  const cuuint64_t query_bytes = static_cast<cuuint64_t>(num_heads) * head_bytes;
  const cuuint64_t count = num_queries == 0 ? std::min(kMaxBytes / query_bytes, kMaxCount)
                                            : static_cast<cuuint64_t>(num_queries);
  return make_map(
      map,
      query,
      dtype,
      {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(num_heads), count},
      {head_bytes, query_bytes},
      {kPlaneElements, static_cast<cuuint32_t>(box.heads), static_cast<cuuint32_t>(box.tokens)});
}

}  // namespace longspan::cuda
