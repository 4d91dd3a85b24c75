#include "kernels/method.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace longspan {

int64_t Amount::blocks(int64_t visible_blocks, int64_t block_tokens) const {
  int64_t wanted = 0;
  switch (kind) {
    case Kind::kBlocks:
      wanted = static_cast<int64_t>(value);
      break;
    case Kind::kTokens:
      wanted = std::max<int64_t>(1, static_cast<int64_t>(value) / block_tokens);
      break;
    case Kind::kRatio:
      // 0.1 * 70 is 7.000000000000001 in binary; the slack keeps it 7.
      wanted = static_cast<int64_t>(
          std::ceil(value * static_cast<double>(visible_blocks) * (1 - 1e-12)));
      break;
  }
  wanted = std::max(wanted, min_blocks);
  if (max_blocks > 0) {
    wanted = std::min(wanted, max_blocks);
  }
  return std::min(wanted, visible_blocks);
}

bool Method::needs_search_query() const {
  return std::any_of(branches.begin(), branches.end(), [](const Branch& branch) {
    return branch.needs_search() && branch.search.query == QuerySource::kSupplied;
  });
}

std::vector<SummarySpec> Method::summaries() const {
  std::vector<SummarySpec> distinct;
  for (const Branch& branch : branches) {
    if (branch.summary.kind != SummaryKind::kNone &&
        std::find(distinct.begin(), distinct.end(), branch.summary) == distinct.end()) {
      distinct.push_back(branch.summary);
    }
  }
  return distinct;
}

int64_t Method::alignment_tokens() const {
  int64_t alignment = kPageTokens;
  for (const Branch& branch : branches) {
    const int64_t blocks[] = {branch.summary.block_tokens,
                              branch.summary.stride_tokens,
                              branch.summary.window_tokens,
                              branch.selection.block_tokens};
    for (const int64_t block : blocks) {
      if (block > 0) {
        alignment = std::lcm(alignment, block);
      }
    }
  }
  return alignment;
}

Method dense_method() {
  Branch branch;
  branch.name = "dense";
  branch.selection.kind = SelectionKind::kAll;
  Method method;
  method.name = "dense";
  method.branches.push_back(std::move(branch));
  return method;
}

const Method& effective_method(const Method& method, int layer, Phase phase, int64_t num_tokens) {
  static const Method kDense = dense_method();
  const bool dense_phase = phase == Phase::kPrefill ? method.dense_prefill : method.dense_decode;
  const bool dense_layer =
      std::find(method.dense_layers.begin(), method.dense_layers.end(), layer) !=
      method.dense_layers.end();
  return dense_phase || dense_layer || num_tokens < method.dense_below_tokens ? kDense : method;
}

int num_selection_heads(const SearchSpec& search, int num_query_heads, int num_kv_heads) {
  switch (search.head_reduce) {
    case HeadReduce::kAllSum:
    case HeadReduce::kAllMean:
    case HeadReduce::kAllMax:
      return 1;
    case HeadReduce::kGroupSum:
    case HeadReduce::kGroupMean:
    case HeadReduce::kGroupMax:
      return num_kv_heads;
    case HeadReduce::kNone:
      break;
  }
  return search.query_reduce == QueryReduce::kNone ? num_query_heads : num_kv_heads;
}

}  // namespace longspan
