// Portable merge: a warp for each row, weights in double precision as in the reference.
#include "kernels/cuda/convert.h"
#include "kernels/cuda/portable.h"
#include "kernels/cuda/warp.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRowsPerBlock = kThreads / kWarpSize;

// Where parts come from: a pointer for each of them, or one array of all.
struct PointerParts {
  MergeParams params;
  __device__ int num_parts() const { return params.num_parts; }
  __device__ int64_t num_rows() const { return params.num_rows; }
  __device__ int value_dim() const { return params.value_dim; }
  __device__ float lse(int part, int64_t row) const { return params.part_lse[part][row]; }
  __device__ float out(int part, int64_t element) const { return params.part_out[part][element]; }
  __device__ float sink(int64_t row) const {
    return params.sink_logits == nullptr ? -INFINITY : params.sink_logits[row];
  }
  __device__ bool wants_out() const { return true; }
  __device__ void write_out(int64_t element, float value) const { params.out[element] = value; }
  __device__ void write_lse(int64_t row, float value) const { params.lse[row] = value; }
};

struct ArrayParts {
  MergePartsArgs args;
  __device__ int num_parts() const { return args.num_parts; }
  __device__ int64_t num_rows() const { return args.num_rows; }
  __device__ int value_dim() const { return args.value_dim; }
  __device__ float lse(int part, int64_t row) const {
    return args.part_lse[part * args.num_rows + row];
  }
  __device__ float out(int part, int64_t element) const {
    return args.part_out[part * args.num_rows * args.value_dim + element];
  }
  __device__ float sink(int64_t /*row*/) const { return -INFINITY; }
  __device__ bool wants_out() const { return args.out != nullptr; }
  __device__ void write_out(int64_t element, float value) const {
    store_as(args.out_dtype, args.out, static_cast<size_t>(element), value);
  }
  __device__ void write_lse(int64_t row, float value) const { args.lse[row] = value; }
};

// 0 for an empty part, whatever the maximum; NaN for NaN.
__device__ double weight_of(double lse, double maximum) {
  return lse == -INFINITY ? 0.0 : exp(lse - maximum);
}

__device__ int64_t row_of_warp() {
  return int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarpSize;
}

// The sum over the parts of weight times channel e, for the 32 channels from `first` on; lane i
// has channel first + i.
template <class Parts>
__device__ double weighted_channel(const Parts& parts, int64_t row, int first, double maximum) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int e = first + lane;
  double sum = 0.0;
  for (int first_part = 0; first_part < parts.num_parts(); first_part += kWarpSize) {
    const int count = min(kWarpSize, parts.num_parts() - first_part);
    const double own = lane < count ? weight_of(parts.lse(first_part + lane, row), maximum) : 0.0;
    for (int i = 0; i < count; ++i) {
      const double weight = __shfl_sync(kFullWarp, own, i);
      // An empty part's output does not count, whatever it holds.
      if (weight != 0.0 && e < parts.value_dim()) {
        sum += weight * parts.out(first_part + i, row * parts.value_dim() + e);
      }
    }
  }
  return sum;
}

template <class Parts>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Parts parts) {
  const int64_t row = row_of_warp();
  if (row >= parts.num_rows()) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const double sink = parts.sink(row);
  double maximum = sink;
  for (int part = lane; part < parts.num_parts(); part += kWarpSize) {
    maximum = fmax(maximum, static_cast<double>(parts.lse(part, row)));
  }
  maximum = warp_max(maximum);
  double total = lane == 0 ? weight_of(sink, maximum) : 0.0;
  for (int part = lane; part < parts.num_parts(); part += kWarpSize) {
    total += weight_of(parts.lse(part, row), maximum);
  }
  total = warp_sum(total);
  for (int first = 0; parts.wants_out() && first < parts.value_dim(); first += kWarpSize) {
    const double sum = weighted_channel(parts, row, first, maximum);
    if (first + lane < parts.value_dim()) {
      parts.write_out(row * parts.value_dim() + first + lane,
                      static_cast<float>(total == 0.0 ? 0.0 : sum / total));
    }
  }
  __syncwarp();  // the row's lse may be a part's, which every lane has read by now
  if (lane == 0) {
    parts.write_lse(row, static_cast<float>(total == 0.0 ? -INFINITY : maximum + log(total)));
  }
}

__global__ void __launch_bounds__(kThreads)
    weigh_kernel(const __grid_constant__ MergeParams params) {
  const int64_t row = row_of_warp();
  if (row >= params.num_rows) {
    return;
  }
  for (int e = static_cast<int>(threadIdx.x) % kWarpSize; e < params.value_dim; e += kWarpSize) {
    double sum = 0.0;
    for (int part = 0; part < params.num_parts; ++part) {
      sum += static_cast<double>(params.weights[part][row]) *
             params.part_out[part][row * params.value_dim + e];
    }
    params.out[row * params.value_dim + e] = static_cast<float>(sum);
  }
}

unsigned num_blocks(int64_t num_rows) {
  return static_cast<unsigned>((num_rows + kRowsPerBlock - 1) / kRowsPerBlock);
}

}  // namespace

cudaError_t launch_merge(const MergeParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) {
    return cudaSuccess;
  }
  if (params.weights == nullptr) {
    merge_kernel<<<num_blocks(params.num_rows), kThreads, 0, stream>>>(PointerParts{params});
  } else {
    weigh_kernel<<<num_blocks(params.num_rows), kThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

cudaError_t launch_merge_parts(const MergePartsArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) {
    return cudaSuccess;
  }
  merge_kernel<<<num_blocks(args.num_rows), kThreads, 0, stream>>>(ArrayParts{args});
  return cudaGetLastError();
}

}  // namespace longspan::cuda
