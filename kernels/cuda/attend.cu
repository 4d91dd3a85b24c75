// Portable attention: a block for each row, head and split (attend_row.h).
#include "kernels/cuda/attend_row.h"

namespace longspan::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(one_row::kAttendThreads)
    attend_kernel(const __grid_constant__ AttendArgs args, int lanes) {
  extern __shared__ float query[];  // [D]
  __shared__ one_row::Scratch<T> scratch;
  one_row::attend<T>(args, blockIdx.x, static_cast<int>(blockIdx.y), lanes, query, scratch);
}

}  // namespace

cudaError_t launch_attend(const AttendArgs& args, cudaStream_t stream) {
  const AttendParams& params = args.params;
  if (params.num_rows == 0) {
    return cudaSuccess;
  }
  return with_element_type(params.kv.dtype, [&]<class T>(T) {
    const dim3 grid(static_cast<unsigned>(params.num_rows * params.num_query_heads),
                    static_cast<unsigned>(args.num_splits));
    const size_t query_bytes = static_cast<size_t>(params.kv.key_dim) * sizeof(float);
    const int lanes = one_row::lanes_of_key(params.kv.key_dim / kVectorSize<T>);
    attend_kernel<T><<<grid, one_row::kAttendThreads, query_bytes, stream>>>(args, lanes);
    return cudaGetLastError();
  });
}

}  // namespace longspan::cuda
