#include "kernels/reference/pipeline.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/anchors.h"
#include "kernels/reference/selection.h"

namespace longspan {
namespace {

using reference::Entries;
using reference::Summaries;

constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();

// The answer of one query head.
struct Answer {
  std::vector<double> out;  // [E]
  double lse = kNegativeInfinity;
};

// One softmax over the entries of `spans`, and over `sink`, whose value is zero. Nothing to attend
// to, or only logits of -inf: out = 0 and lse = -inf.
Answer attend(const ReferenceProblem& problem,
              const float* query,
              int kv_head,
              const Entries& entries,
              const std::vector<Span>& spans,
              double sink = kNegativeInfinity) {
  std::vector<std::pair<double, int64_t>> logits;
  double maximum = sink;
  bool has_nan = false;
  for (const Span& span : spans) {
    for (int64_t entry = span.begin; entry < span.end; ++entry) {
      const double value = reference::logit(problem, query, entries.key(entry, kv_head));
      logits.emplace_back(value, entry);
      maximum = std::fmax(maximum, value);
      has_nan = has_nan || std::isnan(value);
    }
  }
  Answer answer;
  answer.out.assign(static_cast<size_t>(entries.value_dim), 0.0);
  if (maximum == kNegativeInfinity && !has_nan) {
    return answer;
  }
  double total = sink == kNegativeInfinity ? 0.0 : std::exp(sink - maximum);
  for (const auto& [value, entry] : logits) {
    const double weight = std::exp(value - maximum);
    total += weight;
    for (size_t e = 0; e < answer.out.size(); ++e) {
      answer.out[e] += weight * entries.value(entry, kv_head)[e];
    }
  }
  for (double& element : answer.out) {
    element /= total;
  }
  answer.lse = maximum + std::log(total);
  return answer;
}

// Superlinear, equations 4 to 6: every span is attended to together with the window in one softmax
// of its own, and the answers are mixed by a softmax over the spans' search scores, unscaled. A
// token in two spans counts in both. Without spans the window answers alone.
Answer mix_spans(const ReferenceProblem& problem,
                 const float* query,
                 int kv_head,
                 const Entries& tokens,
                 const ReferenceSelection& selection,
                 Span window) {
  if (selection.selected.empty()) {
    return attend(problem, query, kv_head, tokens, {window});
  }
  const double best = selection.selected.front().score;
  Answer mixed;
  mixed.out.assign(static_cast<size_t>(tokens.value_dim), 0.0);
  double total = 0.0;
  for (const ReferenceSelected& span : selection.selected) {
    // Equal scores weigh the same, infinite ones too.
    const double weight = span.score == best ? 1.0 : std::exp(span.score - best);
    const Answer answer = attend(problem, query, kv_head, tokens, {span.tokens, window});
    total += weight;
    for (size_t e = 0; e < mixed.out.size(); ++e) {
      mixed.out[e] += weight * answer.out[e];
    }
  }
  for (double& element : mixed.out) {
    element /= total;
  }
  return mixed;
}

class Run {
 public:
  Run(const ReferenceProblem& problem, const Method& method) : problem_(problem), method_(method) {
    for (const Branch& branch : method.branches) {
      summaries_.push_back(reference::summarize_tokens(problem, branch.summary));
    }
  }

  void answer_row(int64_t row, ReferenceResult& result) const {
    std::vector<std::vector<ReferenceSelection>> selections;  // [branches][H]
    for (size_t b = 0; b < method_.branches.size(); ++b) {
      selections.push_back(reference::select(problem_, method_.branches[b], summaries_[b], row));
    }
    for (int head = 0; head < problem_.num_query_heads; ++head) {
      std::vector<double> out(static_cast<size_t>(problem_.value_dim), 0.0);
      for (size_t b = 0; b < method_.branches.size(); ++b) {
        ReferenceSelection& selection = selections[b][static_cast<size_t>(head)];
        const Answer answer = answer_branch(row, head, b, selection);
        // Gates are not normalised; a branch that sees nothing adds nothing. Other merges have one
        // branch.
        const double gate = method_.needs_gates() ? gate_of(row, head, b) : 1.0;
        for (size_t e = 0; e < out.size(); ++e) {
          out[e] += gate * answer.out[e];
        }
        if (method_.has_lse()) {
          result.lse.push_back(answer.lse);
        }
        result.selections.push_back(std::move(selection));
      }
      result.out.insert(result.out.end(), out.begin(), out.end());
    }
  }

 private:
  double gate_of(int64_t row, int head, size_t branch) const {
    const auto index = static_cast<size_t>(row * problem_.num_query_heads + head);
    return problem_.gates[index * method_.branches.size() + branch];
  }

  Answer answer_branch(int64_t row,
                       int head,
                       size_t index,
                       const ReferenceSelection& selection) const {
    const Branch& branch = method_.branches[index];
    const float* query =
        problem_.query + (row * problem_.num_query_heads + head) * problem_.key_dim;
    const int kv_head = head / (problem_.num_query_heads / problem_.num_kv_heads);
    const int64_t num_tokens = problem_.positions[row] + 1;
    const double sink = method_.has_lse() && problem_.sink_logits != nullptr
                            ? problem_.sink_logits[head]
                            : kNegativeInfinity;
    if (branch.source == BranchSource::kSummaries) {
      return attend(problem_,
                    query,
                    kv_head,
                    summaries_[index].entries,
                    {{0, branch.summary.num_entries(num_tokens)}},
                    sink);
    }
    const Entries tokens = reference::tokens_of(problem_);
    if (method_.merge == MergeKind::kSpanScores) {
      const Span window{std::max<int64_t>(0, num_tokens - static_window(branch)), num_tokens};
      return mix_spans(problem_, query, kv_head, tokens, selection, window);
    }
    return attend(problem_, query, kv_head, tokens, selection.tokens, sink);
  }

  const ReferenceProblem& problem_;
  const Method& method_;
  std::vector<Summaries> summaries_;  // by branch
};

}  // namespace

ReferenceResult run_reference(const ReferenceProblem& problem) {
  int64_t num_tokens = 0;
  for (int64_t row = 0; row < problem.num_rows; ++row) {
    num_tokens = std::max(num_tokens, problem.positions[row] + 1);
  }
  const Method& method =
      effective_method(*problem.method, problem.layer, problem.phase, num_tokens);
  ReferenceResult result;
  result.num_branches = static_cast<int>(method.branches.size());
  const Run run(problem, method);
  for (int64_t row = 0; row < problem.num_rows; ++row) {
    run.answer_row(row, result);
  }
  return result;
}

}  // namespace longspan
