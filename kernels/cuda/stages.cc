#include "kernels/cuda/stages.h"

#include "kernels/cuda/policy.h"

namespace longspan::cuda {

Status summarize(const SummarizeParams& params, Machine& machine) {
  return portable::summarize(params, machine);
}

Status search(const SearchParams& params, Machine& machine) {
  const bool fused = machine.kernels == Kernels::kAll && hopper::search_supports(params, machine);
  return fused ? hopper::search(params, machine) : portable::search(params, machine);
}

Status attend(const AttendParams& params, Machine& machine) {
  const bool all = machine.kernels == Kernels::kAll;
  const bool tiles =
      (all || machine.kernels == Kernels::kTiles) && hopper::tiles_supports(params, machine);
  const bool decode =
      (all || machine.kernels == Kernels::kDecode) && hopper::decode_supports(params, machine);
  const int group = params.num_query_heads / params.kv.num_kv_heads;
  if (decode && (!tiles || prefers_decode(params.num_rows, group))) {
    return hopper::attend_decode(params, machine);
  }
  return tiles ? hopper::attend_tiles(params, machine) : portable::attend(params, machine);
}

Status merge(const MergeParams& params, Machine& machine) {
  return portable::merge(params, machine);
}

}  // namespace longspan::cuda
