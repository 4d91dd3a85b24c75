// Portable summaries, with the bits of the reference: a thread for each entry, head and vector of
// channels adds its tokens in order, one rounding an operation.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/convert.h"
#include "kernels/cuda/portable.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;

// The NaN that a machine of the x86 family makes of an operation: an operand's, or its own. The
// GPU's is always 0x7fffffff, and summaries are the same bits on every backend.
__device__ float with_nan_of(float result, float first, float second) {
  if (!isnan(result)) {
    return result;
  }
  const float source = isnan(first) ? first : second;
  return __uint_as_float(isnan(source) ? __float_as_uint(source) | 0x400000U : 0xffc00000U);
}

enum class Operation : uint8_t { kSum, kWeightedSum, kMinimum, kMaximum };

__device__ float accumulate(Operation operation, float so_far, float element, float weight) {
  switch (operation) {
    case Operation::kSum:
      return with_nan_of(__fadd_rn(so_far, element), so_far, element);
    case Operation::kWeightedSum:
      return with_nan_of(__fmaf_rn(weight, element, so_far), element, so_far);
    case Operation::kMinimum:
      return element < so_far ? element : so_far;
    case Operation::kMaximum:
      return element > so_far ? element : so_far;
  }
  return so_far;
}

__device__ float scaled(float value, float factor) {
  return with_nan_of(__fmul_rn(value, factor), value, value);
}

// Where one of the two halves of an entry comes from, and how.
struct Half {
  bool from_values;
  Operation operation;
  const float* weights;
  float mean_factor;
  float length_factor;
};

__device__ Half half_of(const SummarizeArgs& args, bool values) {
  switch (args.kind) {
    case SummaryKind::kMinMax:
      return {false, values ? Operation::kMaximum : Operation::kMinimum, nullptr, 1.0F, 1.0F};
    case SummaryKind::kCompressed: {
      const float* weights = values ? args.value_weights : args.key_weights;
      return weights == nullptr ? Half{values, Operation::kSum, nullptr, args.mean_factor, 1.0F}
                                : Half{values, Operation::kWeightedSum, weights, 1.0F, 1.0F};
    }
    case SummaryKind::kMean:
    case SummaryKind::kNone:
      break;
  }
  return {false, Operation::kSum, nullptr, args.mean_factor, args.length_factor};
}

__device__ void store_exactly(DataType type, std::byte* row, int channel, float value) {
  switch (type) {
    case DataType::kFloat32:
      reinterpret_cast<float*>(row)[channel] = value;
      return;
    case DataType::kFloat16:
      reinterpret_cast<uint16_t*>(row)[channel] = float_to_float16(value);
      return;
    case DataType::kBFloat16:
      reinterpret_cast<uint16_t*>(row)[channel] = float_to_bfloat16(value);
      return;
  }
}

// Loads that keep a NaN's bits as the host's conversion does.
__device__ float load_exactly(float element) { return element; }
__device__ float load_exactly(__half element) {
  return float16_to_float(__half_as_ushort(element));
}
__device__ float load_exactly(__nv_bfloat16 element) {
  return bfloat16_to_float(__bfloat16_as_ushort(element));
}

// grid.x strides over (entry, kv head, vector of a half's channels); grid.y: keys, then values.
template <class T>
__global__ void __launch_bounds__(kThreads)
    summarize_kernel(const __grid_constant__ SummarizeArgs args) {
  constexpr int kVector = kVectorSize<T>;
  const bool values = blockIdx.y == 1;
  const int dim = values ? args.out.value_dim : args.out.key_dim;
  const int num_vectors = dim / kVector;
  const int64_t work = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t entry = work / num_vectors / args.out.num_kv_heads;
  if (entry >= args.num_entries) {
    return;
  }
  const int kv_head = static_cast<int>(work / num_vectors % args.out.num_kv_heads);
  const int channel = static_cast<int>(work % num_vectors) * kVector;
  const Half half = half_of(args, values);
  const int64_t first_token = (args.first_entry + entry) * args.stride;
  const bool extreme =
      half.operation == Operation::kMinimum || half.operation == Operation::kMaximum;

  float results[kVector] = {};
  for (int64_t i = 0; i < args.span; ++i) {
    const int64_t token = first_token + i;
    const std::byte* row =
        half.from_values ? args.tokens.value(token, kv_head) : args.tokens.key(token, kv_head);
    alignas(16) T elements[kVector];
    *reinterpret_cast<uint4*>(elements) =
        *reinterpret_cast<const uint4*>(reinterpret_cast<const T*>(row) + channel);
    const float weight = half.weights == nullptr ? 0.0F : half.weights[i];
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      const float element = load_exactly(elements[c]);
      results[c] =
          extreme && i == 0 ? element : accumulate(half.operation, results[c], element, weight);
    }
  }
  const int64_t out_entry = args.first_out + entry;
  auto* out = const_cast<std::byte*>(values ? args.out.value(out_entry, kv_head)
                                            : args.out.key(out_entry, kv_head));
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    float result = results[c];
    if (half.operation == Operation::kSum) {
      result = scaled(scaled(result, half.mean_factor), half.length_factor);
    }
    store_exactly(args.out.dtype, out, channel + c, result);
  }
}

}  // namespace

cudaError_t launch_summarize(const SummarizeArgs& args, cudaStream_t stream) {
  if (args.num_entries == 0) {
    return cudaSuccess;
  }
  return with_element_type(args.tokens.dtype, [&]<class T>(T) {
    const int dim = std::max(args.out.key_dim, args.out.value_dim);
    const int64_t work = args.num_entries * args.out.num_kv_heads * (dim / kVectorSize<T>);
    const dim3 grid(static_cast<unsigned>((work + kThreads - 1) / kThreads),
                    args.out.value_dim > 0 ? 2U : 1U);
    summarize_kernel<T><<<grid, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

}  // namespace longspan::cuda
