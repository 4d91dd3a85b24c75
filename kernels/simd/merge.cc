// Merging of partial results, rows shared out to threads.
#include <algorithm>

#include "base/checked.h"
#include "kernels/simd/stages.h"

namespace longspan::simd {
namespace {

constexpr int64_t kRowsPerTask = 256;

}  // namespace

Status merge(const MergeParams& params, Machine& machine) {
  machine.pool.run(divide_up(params.num_rows, kRowsPerTask), [&](int64_t index, int /*thread*/) {
    const int64_t begin = index * kRowsPerTask;
    machine.target.merge_rows(params, begin, std::min(begin + kRowsPerTask, params.num_rows));
  });
  return absl::OkStatus();
}

}  // namespace longspan::simd
