#include "tests/support/methods.h"

#include <utility>

namespace longspan::testing {
namespace {

Branch block_branch(SummaryKind kind, int block_tokens) {
  Branch branch;
  branch.name = "selected";
  branch.summary.kind = kind;
  branch.summary.block_tokens = block_tokens;
  branch.selection.kind = SelectionKind::kTopK;
  branch.selection.block_tokens = block_tokens;
  return branch;
}

void set_budget(Branch& branch, int prefill_blocks, int decode_blocks) {
  branch.budget.prefill.value = prefill_blocks;
  branch.budget.decode.value = decode_blocks;
}

Method single(std::string name, Branch branch) {
  Method method;
  method.name = std::move(name);
  method.branches.push_back(std::move(branch));
  return method;
}

}  // namespace

Method window_method(int64_t window_tokens, int64_t sink_tokens) {
  Branch branch;
  branch.name = "window";
  branch.mask = {window_tokens, sink_tokens};
  return single("window", std::move(branch));
}

Method moba_method(int block_tokens, int blocks) {
  Branch branch = block_branch(SummaryKind::kMean, block_tokens);
  branch.selection.forced_within_budget = true;
  set_budget(branch, blocks, blocks);
  return single("moba", std::move(branch));
}

Method kinetics_method(int block_tokens, int blocks) {
  Branch branch = block_branch(SummaryKind::kMean, block_tokens);
  branch.search.query_reduce = QueryReduce::kGroupMean;
  branch.mask = {block_tokens * 2, 4};
  set_budget(branch, blocks, blocks);
  return single("kinetics", std::move(branch));
}

Method quest_method(int block_tokens, int blocks) {
  Branch branch = block_branch(SummaryKind::kMinMax, block_tokens);
  branch.search.score = ScoreKind::kBound;
  branch.selection.forced_within_budget = true;
  set_budget(branch, blocks, blocks);
  return single("quest", std::move(branch));
}

Method nsa_method(int window, int stride, int block_tokens, int blocks, int64_t window_tokens) {
  SummarySpec compressed;
  compressed.kind = SummaryKind::kCompressed;
  compressed.window_tokens = window;
  compressed.stride_tokens = stride;

  Branch summaries;
  summaries.name = "compressed";
  summaries.source = BranchSource::kSummaries;
  summaries.summary = compressed;

  Branch selected = block_branch(SummaryKind::kNone, block_tokens);
  selected.summary = compressed;
  selected.search.normalise = Normalise::kSoftmax;
  selected.search.head_reduce = HeadReduce::kGroupSum;
  selected.selection.forced_first_blocks = 1;
  selected.selection.forced_last_blocks = 2;
  selected.selection.forced_within_budget = true;
  set_budget(selected, blocks, blocks);

  Branch local;
  local.name = "window";
  local.mask.window_tokens = window_tokens;

  Method method;
  method.name = "nsa";
  method.branches = {summaries, selected, local};
  method.merge = MergeKind::kGates;
  return method;
}

Method superlinear_method(const SpanSearch& search) {
  Branch branch;
  branch.name = "spans";
  branch.search.query = QuerySource::kSupplied;
  branch.search.view = SearchView::kAnchor;
  branch.search.anchor_power = search.power;
  branch.search.anchor_first_stripe = search.first_stripe;
  branch.selection.kind = SelectionKind::kTopK;
  branch.selection.spans = true;
  branch.selection.span_power = search.power;
  branch.selection.span_backward = search.backward;
  branch.selection.span_forward = search.forward;
  set_budget(branch, search.spans, search.spans);
  Method method = single("superlinear", std::move(branch));
  method.merge = MergeKind::kSpanScores;
  return method;
}

Method a_shape_method(int block_tokens, int prefill_blocks, int decode_blocks) {
  Branch branch = block_branch(SummaryKind::kMean, block_tokens);
  branch.search.head_reduce = HeadReduce::kGroupMax;
  branch.mask = {block_tokens * 3, 5};
  set_budget(branch, prefill_blocks, decode_blocks);
  return single("a_shape", std::move(branch));
}

std::vector<Method> all_methods() {
  Method pooled = nsa_method(64, 64, 64, 4, 96);
  pooled.name = "nsa_pooled";
  SpanSearch released;
  released.power = {11, 20};
  released.backward = {3, 1};
  released.forward = {1, 1};
  released.spans = 3;
  released.first_stripe = 5;
  Method superlinear_released = superlinear_method(released);
  superlinear_released.name = "superlinear_released";
  return {dense_method(),
          window_method(70, 5),
          moba_method(64, 3),
          kinetics_method(16, 3),
          quest_method(16, 4),
          nsa_method(32, 16, 64, 4, 96),
          std::move(pooled),
          superlinear_method({}),
          std::move(superlinear_released),
          a_shape_method(32, 3, 2)};
}

}  // namespace longspan::testing
