#include "kernels/cuda/portable.h"

#include <cmath>
#include <vector>

#include "kernels/cuda/policy.h"
#include "kernels/cuda/stages.h"

namespace longspan::cuda::portable {
namespace {

// `count` elements of the workspace.
template <class T>
StatusOr<T*> take(Machine& machine, int64_t count) {
  LONGSPAN_ASSIGN_OR_RETURN(std::byte * memory,
                            machine.workspace.take(static_cast<size_t>(count) * sizeof(T)));
  return reinterpret_cast<T*>(memory);
}

// The weights on the device; null where there are none.
StatusOr<const float*> upload(const std::vector<float>& weights, Machine& machine) {
  if (weights.empty()) {
    return nullptr;
  }
  LONGSPAN_ASSIGN_OR_RETURN(float* memory,
                            take<float>(machine, static_cast<int64_t>(weights.size())));
  LONGSPAN_RETURN_IF_ERROR(copy_to_device(reinterpret_cast<std::byte*>(memory),
                                          weights.data(),
                                          weights.size() * sizeof(float),
                                          machine.stream));
  return memory;
}

SearchArgs resolve(const SearchParams& params) {
  const SearchSpec& spec = *params.spec;
  SearchArgs args;
  args.query = params.query;
  args.num_rows = params.num_rows;
  args.num_query_heads = params.num_query_heads;
  args.num_lists = num_selection_heads(spec, params.num_query_heads, params.view.num_kv_heads);
  args.num_score_heads =
      spec.query_reduce == QueryReduce::kNone ? params.num_query_heads : params.view.num_kv_heads;
  args.query_reduce = spec.query_reduce;
  args.head_reduce = spec.head_reduce;
  args.anchors = spec.view == SearchView::kAnchor;
  args.bound = spec.score == ScoreKind::kBound;
  args.softmax = spec.normalise == Normalise::kSoftmax;
  args.scale = params.scale;
  args.soft_cap = params.soft_cap;
  args.view = params.view;
  args.candidate_begin = params.candidate_begin;
  args.candidate_end = params.candidate_end;
  args.candidates = params.candidates;
  args.candidate_offsets = params.candidate_offsets;
  if (args.softmax) {
    args.window_tokens = params.summary->window_tokens;
    args.stride_tokens = params.summary->stride_tokens;
  }
  args.block_tokens = params.block_tokens;
  args.visible_entries = params.visible_entries;
  args.lse = params.lse;
  args.halo = params.halo;
  args.stripe_tokens = params.stripe_tokens;
  args.starts_context = params.starts_context;
  args.k = params.k;
  args.max_k = params.max_k;
  args.scores = params.scores;
  args.ids = params.ids;
  return args;
}

}  // namespace

Status summarize(const SummarizeParams& params, Machine& machine) {
  const SummarySpec& spec = *params.spec;
  SummarizeArgs args;
  args.tokens = params.tokens;
  args.out = params.out;
  args.first_entry = params.first_entry;
  args.num_entries = params.num_entries;
  args.first_out = params.first_out;
  args.kind = spec.kind;
  args.span = spec.span();
  args.stride = spec.stride();
  args.mean_factor = 1.0F / static_cast<float>(spec.span());
  if (spec.kind == SummaryKind::kMean && spec.scale_by_sqrt_length) {
    args.length_factor = static_cast<float>(std::sqrt(static_cast<double>(spec.block_tokens)));
  }
  if (spec.kind == SummaryKind::kCompressed) {
    LONGSPAN_ASSIGN_OR_RETURN(args.key_weights, upload(spec.key_weights, machine));
    args.value_weights = args.key_weights;
    if (!spec.value_weights.empty()) {
      LONGSPAN_ASSIGN_OR_RETURN(args.value_weights, upload(spec.value_weights, machine));
    }
  }
  return to_status(launch_summarize(args, machine.stream), "summarize");
}

Status search(const SearchParams& params, Machine& machine) {
  SearchArgs args = resolve(params);
  const int64_t num_lists = args.num_rows * args.num_lists;
  const SearchGrid grid = search_grid(num_lists, args.view.num_entries, args.max_k, machine.device);
  args.num_splits = grid.num_splits;
  args.num_blocks = grid.num_blocks;
  args.queue_capacity = grid.queue_capacity;
  const int64_t heads_of_list = args.num_score_heads / args.num_lists;
  LONGSPAN_ASSIGN_OR_RETURN(
      args.head_queries,
      take<double>(machine, grid.num_blocks * heads_of_list * args.view.key_dim));
  if (grid.num_splits > 1) {
    LONGSPAN_ASSIGN_OR_RETURN(
        args.part_keys, take<CandidateKey>(machine, num_lists * grid.num_splits * args.max_k));
  }
  if (!grid.shared_queue) {
    LONGSPAN_ASSIGN_OR_RETURN(args.buffers,
                              take<CandidateKey>(machine, grid.num_blocks * grid.queue_capacity));
  }
  return to_status(launch_search(args, machine.stream), "search");
}

Status attend(const AttendParams& params, Machine& machine) {
  const int64_t num_rows = params.num_rows * params.num_query_heads;
  AttendArgs args;
  args.params = params;
  args.num_splits = attend_splits(num_rows, params.kv.num_entries, machine.device);
  if (args.num_splits == 1) {
    return to_status(launch_attend(args, machine.stream), "attend");
  }
  MergePartsArgs parts;
  parts.num_parts = args.num_splits;
  parts.num_rows = num_rows;
  parts.value_dim = params.kv.value_dim;
  parts.out = params.out;
  parts.out_dtype = params.out_dtype;
  parts.lse = params.lse;
  LONGSPAN_ASSIGN_OR_RETURN(args.part_lse, take<float>(machine, parts.num_parts * num_rows));
  parts.part_lse = args.part_lse;
  if (params.out != nullptr) {
    LONGSPAN_ASSIGN_OR_RETURN(args.part_out,
                              take<float>(machine, parts.num_parts * num_rows * parts.value_dim));
    parts.part_out = args.part_out;
  }
  LONGSPAN_RETURN_IF_ERROR(to_status(launch_attend(args, machine.stream), "attend"));
  return to_status(launch_merge_parts(parts, machine.stream), "merge of splits");
}

Status merge(const MergeParams& params, Machine& machine) {
  return to_status(launch_merge(params, machine.stream), "merge");
}

}  // namespace longspan::cuda::portable
