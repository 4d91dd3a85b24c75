// A grid that goes through the list of rows to make again, which mostly is empty; each row by the
// code of portable attention.
#include "kernels/cuda/attend_repair.h"
#include "kernels/cuda/attend_row.h"
#include "kernels/cuda/ptx.h"

namespace longspan::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(one_row::kAttendThreads)
    attend_repair_kernel(const __grid_constant__ AttendArgs args, RepairList list, int lanes) {
  extern __shared__ float query[];  // [D]
  __shared__ one_row::Scratch<T> scratch;
  ptx::wait_for_dependencies();
  const int32_t count = *list.count;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    one_row::attend<T>(args, list.rows[i], 0, lanes, query, scratch);
  }
}

}  // namespace

cudaError_t launch_attend_repair(const AttendParams& params,
                                 const RepairList& list,
                                 int num_sms,
                                 cudaStream_t stream) {
  constexpr int kBlocksPerSm = 4;
  AttendArgs args;
  args.params = params;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_sms * kBlocksPerSm));
  config.blockDim = dim3(one_row::kAttendThreads);
  config.dynamicSmemBytes = static_cast<size_t>(params.kv.key_dim) * sizeof(float);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return with_element_type(params.kv.dtype, [&]<class T>(T) {
    const int lanes = one_row::lanes_of_key(params.kv.key_dim / kVectorSize<T>);
    return cudaLaunchKernelEx(&config, attend_repair_kernel<T>, args, list, lanes);
  });
}

}  // namespace longspan::cuda
