#include <optional>

#include "kernels/cuda/attend_decode.h"
#include "kernels/cuda/attend_tiles.h"
#include "kernels/cuda/importance.h"
#include "kernels/cuda/policy.h"
#include "kernels/cuda/search_policy.h"
#include "kernels/cuda/search_topk.h"
#include "kernels/cuda/stages.h"

namespace longspan::cuda::hopper {
namespace {

// How the score heads of a KV head are joined, in the words of the fused search.
void set_reductions(const SearchSpec& spec, SearchShape& shape) {
  const bool reduced = spec.query_reduce != QueryReduce::kNone;
  const HeadReduce reduce = spec.head_reduce;
  const bool sum = reduce == HeadReduce::kGroupSum || reduce == HeadReduce::kAllSum;
  const bool mean = reduce == HeadReduce::kGroupMean || reduce == HeadReduce::kAllMean;
  const bool maximum = reduce == HeadReduce::kGroupMax || reduce == HeadReduce::kAllMax;
  shape.join_all_heads = reduce == HeadReduce::kAllSum || reduce == HeadReduce::kAllMean ||
                         reduce == HeadReduce::kAllMax;
  if (reduced) {
    shape.query_form =
        spec.query_reduce == QueryReduce::kGroupMean ? QueryForm::kGroupMean : QueryForm::kAllMean;
  } else {
    shape.query_form = sum || mean ? QueryForm::kGroupSum : QueryForm::kEachHead;
  }
  // A single vector of a KV head has nothing to be joined with, but for other KV heads.
  if (maximum && (shape.join_all_heads || !reduced)) {
    shape.join = ScoreJoin::kMax;
  } else if ((sum || mean) && shape.join_all_heads) {
    shape.join = ScoreJoin::kSum;
  }
  if (mean) {
    const int heads_of_set = shape.join_all_heads ? shape.num_kv_heads : 1;
    shape.divisor = static_cast<float>(heads_of_set * (reduced ? 1 : shape.group()));
  }
}

// Nothing where the search is of another kind.
std::optional<SearchShape> shape_of(const SearchParams& params) {
  const SearchSpec& spec = *params.spec;
  if (spec.view != SearchView::kSummary || spec.normalise != Normalise::kRaw) {
    return std::nullopt;
  }
  SearchShape shape;
  shape.num_rows = params.num_rows;
  shape.num_query_heads = params.num_query_heads;
  shape.num_kv_heads = params.view.num_kv_heads;
  shape.dim = params.view.key_dim;
  shape.num_entries = params.view.num_entries;
  shape.max_k = params.max_k;
  shape.dtype = params.view.dtype;
  shape.score = spec.score == ScoreKind::kBound ? ScoreForm::kBound : ScoreForm::kDot;
  set_reductions(spec, shape);
  return shape;
}

// NSA's importance over the windows of one stripe, added up over the heads of a KV head. Nothing
// where the search is of another kind.
std::optional<ImportanceShape> importance_shape_of(const SearchParams& params) {
  const SearchSpec& spec = *params.spec;
  const bool mean = spec.head_reduce == HeadReduce::kGroupMean;
  if (spec.view != SearchView::kSummary || spec.normalise != Normalise::kSoftmax ||
      spec.query_reduce != QueryReduce::kNone || params.soft_cap != 0.0F ||
      (spec.head_reduce != HeadReduce::kGroupSum && !mean) || params.halo.pages != nullptr ||
      params.stripe_tokens != 0) {
    return std::nullopt;
  }
  ImportanceShape shape;
  shape.num_rows = params.num_rows;
  shape.num_query_heads = params.num_query_heads;
  shape.num_kv_heads = params.view.num_kv_heads;
  shape.dim = params.view.key_dim;
  shape.num_windows = params.view.num_entries;
  shape.max_k = params.max_k;
  shape.dtype = params.view.dtype;
  shape.window_tokens = params.summary->window_tokens;
  shape.stride_tokens = params.summary->stride_tokens;
  shape.block_tokens = params.block_tokens;
  shape.mean_of_heads = mean;
  return shape;
}

DecodeArgs decode_args(const AttendParams& params, const DeviceInfo& device) {
  DecodeArgs args;
  args.params = params;
  args.num_sms = device.num_sms;
  args.shared_memory_per_block = device.shared_memory_per_block;
  return args;
}

// So many zeros, which stay there between calls.
StatusOr<uint32_t*> tickets(int64_t count, Machine& machine) {
  const auto num_bytes = static_cast<size_t>(count) * sizeof(uint32_t);
  if (machine.tickets.size() < num_bytes) {
    LONGSPAN_ASSIGN_OR_RETURN(machine.tickets, DeviceBuffer::allocate(num_bytes));
    LONGSPAN_CUDA_RETURN_IF_ERROR(
        cudaMemsetAsync(machine.tickets.data(), 0, num_bytes, machine.stream));
  }
  return reinterpret_cast<uint32_t*>(machine.tickets.data());
}

Status search_importance(const SearchParams& params,
                         const ImportanceShape& shape,
                         Machine& machine) {
  ImportanceArgs args;
  args.shape = shape;
  args.query = params.query;
  args.pages = params.view.pages;
  args.lse = params.lse;
  args.scale = params.scale;
  args.visible_windows = params.visible_entries;
  args.candidate_begin = params.candidate_begin;
  args.candidate_end = params.candidate_end;
  args.k = params.k;
  args.scores = params.scores;
  args.ids = params.ids;
  const ImportancePlan plan = plan_importance(shape, machine.device);
  LONGSPAN_ASSIGN_OR_RETURN(std::byte* const memory, machine.workspace.take(plan.workspace_bytes));
  LONGSPAN_ASSIGN_OR_RETURN(uint32_t* const zeros, tickets(plan.num_tickets, machine));
  return to_status(launch_importance(args, plan, memory, zeros, machine.stream), "importance");
}

}  // namespace

bool search_supports(const SearchParams& params, const Machine& machine) {
  if (const std::optional<ImportanceShape> shape = importance_shape_of(params)) {
    return plan_importance(*shape, machine.device).declined == nullptr;
  }
  const std::optional<SearchShape> shape = shape_of(params);
  return shape.has_value() && plan_search_topk(*shape, machine.device).supported;
}

Status search(const SearchParams& params, Machine& machine) {
  if (const std::optional<ImportanceShape> shape = importance_shape_of(params)) {
    return search_importance(params, *shape, machine);
  }
  SearchTopkArgs args;
  args.shape = shape_of(params).value();
  args.query = params.query;
  args.pages = params.view.pages;
  args.candidate_begin = params.candidate_begin;
  args.candidate_end = params.candidate_end;
  args.k = params.k;
  args.scores = params.scores;
  args.ids = params.ids;
  const SearchPlan plan = plan_search_topk(args.shape, machine.device);
  LONGSPAN_ASSIGN_OR_RETURN(std::byte* const memory, machine.workspace.take(plan.workspace_bytes));
  LONGSPAN_ASSIGN_OR_RETURN(uint32_t* const zeros, tickets(plan.num_tickets, machine));
  return to_status(launch_search_topk(args, plan, memory, zeros, machine.stream), "search_topk");
}

bool decode_supports(const AttendParams& params, const Machine& machine) {
  return machine.device.is_hopper() &&
         decode_declines(decode_args(params, machine.device)) == nullptr;
}

Status attend_decode(const AttendParams& params, Machine& machine) {
  DecodeArgs args = decode_args(params, machine.device);
  LONGSPAN_ASSIGN_OR_RETURN(args.workspace, machine.workspace.take(decode_workspace_bytes(args)));
  return to_status(launch_attend_decode(args, machine.stream), "attend_decode");
}

bool tiles_supports(const AttendParams& params, const Machine& machine) {
  return machine.device.is_hopper() && params.query_dtype == params.kv.dtype &&
         attend_tiles_supports(params);
}

Status attend_tiles(const AttendParams& params, Machine& machine) {
  AttendTilesArgs args;
  args.params = params;
  TileShape shape;
  shape.key_dim = params.kv.key_dim;
  shape.value_dim = params.kv.value_dim;
  shape.group = params.num_query_heads / params.kv.num_kv_heads;
  const bool head_lists = params.num_selection_heads > params.kv.num_kv_heads;
  shape.lists_per_token = head_lists ? shape.group : 1;
  // Lists of a KV head are selected; one for all heads is what all see.
  const bool selected = params.num_selection_heads > 1;
  args.tile_rows = attend_tile_rows(shape, selected ? 1 : params.num_rows * shape.group);
  args.num_sms = machine.device.num_sms;
  const int64_t bytes_of_token =
      static_cast<int64_t>(size_of(params.kv.dtype)) * (params.kv.key_dim + params.kv.value_dim);
  args.section_heads =
      section_heads(params.kv.num_kv_heads, params.kv.num_entries * bytes_of_token, machine.device);
  const auto scratch_bytes = static_cast<size_t>(attend_tiles_scratch(params)) * sizeof(int32_t);
  LONGSPAN_ASSIGN_OR_RETURN(std::byte* const memory, machine.workspace.take(scratch_bytes));
  args.scratch = reinterpret_cast<int32_t*>(memory);
  return to_status(launch_attend_tiles(args, machine.stream), "attend_tiles");
}

}  // namespace longspan::cuda::hopper
