#include "tests/worker/context_model.h"

#include <algorithm>
#include <cmath>

#include <gtest/gtest.h>

#include "tests/support/compare.h"

namespace longspan::testing {
namespace {

// Selections may differ where the decision is closer than this share of the best score: single
// precision sums of a few hundred products.
constexpr double kTie = 2e-5;

Deadline far() { return std::chrono::steady_clock::now() + std::chrono::minutes(5); }

bool is_tie(const ReferenceSelection& selection) {
  double largest = 0;
  for (const ReferenceSelected& selected : selection.selected) {
    if (!selected.forced && std::isfinite(selected.score)) {
      largest = std::max(largest, std::abs(selected.score));
    }
  }
  return selection.margin <= kTie * largest;
}

std::vector<Span> distinct(const RowSelection& selection) {
  std::vector<Span> spans;
  for (const SelectedSpan& span : selection.spans) {
    spans.push_back({span.begin, span.end});
  }
  std::sort(spans.begin(), spans.end(), [](Span a, Span b) { return a.begin < b.begin; });
  std::vector<Span> joined;
  for (const Span& span : spans) {
    if (!joined.empty() && span.begin <= joined.back().end) {
      joined.back().end = std::max(joined.back().end, span.end);
    } else {
      joined.push_back(span);
    }
  }
  return joined;
}

std::string text(const std::vector<Span>& spans) {
  std::string out;
  for (const Span& span : spans) {
    absl::StrAppend(&out, "[", span.begin, ",", span.end, ") ");
  }
  return out;
}

}  // namespace

struct ContextModel::Numbers {
  Rows tokens;
  std::vector<float> query;
  std::vector<float> search_query;
  std::vector<float> gates;
};

int64_t ContextModel::length(int layer) const {
  return static_cast<int64_t>(layers_[static_cast<size_t>(layer)].keys.size() / key_row());
}

Rows ContextModel::make_rows(int64_t num_rows) {
  return {random_.normals(static_cast<size_t>(num_rows) * key_row()),
          random_.normals(static_cast<size_t>(num_rows) * value_row())};
}

Rows ContextModel::stored_rows(int layer, int64_t begin, int64_t end) const {
  const Layer& stored = layers_[static_cast<size_t>(layer)];
  const auto slice = [&](const std::vector<float>& values, size_t row) {
    const auto first =
        values.begin() + static_cast<std::ptrdiff_t>(begin) * static_cast<std::ptrdiff_t>(row);
    return std::vector<float>(
        first, first + static_cast<std::ptrdiff_t>(end - begin) * static_cast<std::ptrdiff_t>(row));
  };
  return {slice(stored.keys, key_row()), slice(stored.values, value_row())};
}

void ContextModel::add(int layer, const Rows& rows) {
  Layer& stored = layers_[static_cast<size_t>(layer)];
  Rows rounded = rows;
  round_to(shape_.kv_dtype, rounded.keys);
  round_to(shape_.kv_dtype, rounded.values);
  stored.keys.insert(stored.keys.end(), rounded.keys.begin(), rounded.keys.end());
  stored.values.insert(stored.values.end(), rounded.values.begin(), rounded.values.end());
}

Status ContextModel::write(int layer, int64_t start_pos, const Rows& rows) {
  const auto num_rows = static_cast<int64_t>(rows.keys.size() / key_row());
  return group_.write(handle_, layer, start_pos, num_rows, fp32(rows.keys), fp32(rows.values));
}

void ContextModel::append(int64_t num_tokens) {
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    for (int64_t left = num_tokens; left > 0;) {
      const int64_t count = random_.between(1, left);
      const Rows rows = make_rows(count);
      const Status status = write(layer, length(layer), rows);
      ASSERT_TRUE(status.ok()) << status;
      add(layer, rows);
      left -= count;
    }
  }
  const Status status = group_.commit(handle_);
  ASSERT_TRUE(status.ok()) << status;
}

void ContextModel::truncate(int64_t num_tokens) {
  const Status status = group_.truncate(handle_, num_tokens);
  ASSERT_TRUE(status.ok()) << status;
  for (Layer& layer : layers_) {
    const auto rows = static_cast<size_t>(num_tokens);
    layer.keys.resize(std::min(layer.keys.size(), rows * key_row()));
    layer.values.resize(std::min(layer.values.size(), rows * value_row()));
  }
}

ContextModel ContextModel::fork(ContextHandle child, int64_t num_tokens) {
  const Status status = group_.fork(handle_, child, num_tokens);
  EXPECT_TRUE(status.ok()) << status;
  ContextModel model(group_, child, shape_, random_);
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    model.add(layer, stored_rows(layer, 0, num_tokens));
  }
  return model;
}

ContextModel::Numbers ContextModel::make_numbers(const Question& question, const Method& method) {
  Numbers numbers;
  const size_t heads =
      static_cast<size_t>(question.num_rows) * static_cast<size_t>(shape_.num_query_heads);
  numbers.query = random_.normals(heads * static_cast<size_t>(shape_.key_dim));
  if (method.needs_search_query()) {
    numbers.search_query = random_.normals(heads * static_cast<size_t>(shape_.key_dim), 0.3F);
  }
  if (method.needs_gates()) {
    numbers.gates = random_.normals(heads * method.branches.size(), 0.5F);
  }
  if (question.brings_tokens) {
    // Rows that are there already must be brought as they are.
    const int64_t held =
        std::clamp<int64_t>(length(question.layer) - question.start_pos, 0, question.num_rows);
    numbers.tokens = stored_rows(question.layer, question.start_pos, question.start_pos + held);
    const Rows fresh = make_rows(question.num_rows - held);
    add(question.layer, fresh);
    numbers.tokens.keys.insert(numbers.tokens.keys.end(), fresh.keys.begin(), fresh.keys.end());
    numbers.tokens.values.insert(
        numbers.tokens.values.end(), fresh.values.begin(), fresh.values.end());
  }
  return numbers;
}

AttendItem ContextModel::item(const Question& question,
                              const Method& method,
                              const Numbers& numbers) const {
  AttendItem item;
  item.context = handle_;
  item.layer = question.layer;
  item.phase = question.phase;
  item.start_pos = question.start_pos;
  item.num_rows = question.num_rows;
  item.query = fp32(numbers.query);
  item.key = fp32(numbers.tokens.keys);
  item.value = fp32(numbers.tokens.values);
  item.gates = fp32(numbers.gates);
  item.search_query = fp32(numbers.search_query);
  item.method = &method;
  item.return_selection = true;
  return item;
}

ReferenceResult ContextModel::reference_of(const Question& question,
                                           const Method& method,
                                           const Numbers& numbers) const {
  const Layer& stored = layers_[static_cast<size_t>(question.layer)];
  std::vector<int64_t> positions;
  for (int64_t row = 0; row < question.num_rows; ++row) {
    positions.push_back(question.start_pos + row);
  }
  ReferenceProblem problem;
  problem.method = &method;
  problem.phase = question.phase;
  problem.layer = question.layer;
  problem.num_query_heads = shape_.num_query_heads;
  problem.num_kv_heads = shape_.num_kv_heads;
  problem.key_dim = shape_.key_dim;
  problem.value_dim = shape_.value_dim;
  problem.kv_dtype = shape_.kv_dtype;
  problem.scale = shape_.scale;
  problem.soft_cap = shape_.soft_cap;
  problem.sink_logits = shape_.sink_logits.empty() ? nullptr : shape_.sink_logits.data();
  problem.num_tokens = length(question.layer);
  problem.keys = stored.keys.data();
  problem.values = stored.values.data();
  problem.num_rows = question.num_rows;
  problem.positions = positions.data();
  problem.query = numbers.query.data();
  problem.search_query = numbers.search_query.data();
  problem.gates = numbers.gates.data();
  return run_reference(problem);
}

void ContextModel::check(const Question& question,
                         const Method& method,
                         const Numbers& numbers,
                         const AttendResult& result,
                         Tally& tally) const {
  ASSERT_TRUE(result.status.ok()) << result.status;
  EXPECT_EQ(result.layer_length, length(question.layer));
  const ReferenceResult reference = reference_of(question, method, numbers);
  const auto value_dim = static_cast<std::ptrdiff_t>(shape_.value_dim);
  const auto branches = static_cast<size_t>(reference.num_branches);
  const size_t rows = static_cast<size_t>(question.num_rows * shape_.num_query_heads);
  ASSERT_EQ(result.out.size(), reference.out.size());
  ASSERT_EQ(result.lse.size(), reference.lse.size());
  ASSERT_EQ(result.selections.size(), rows * branches);
  std::vector<float> out;
  std::vector<double> expected_out;
  std::vector<float> lse;
  std::vector<double> expected_lse;
  for (size_t i = 0; i < rows; ++i) {
    const std::span selections = std::span(reference.selections).subspan(i * branches, branches);
    ++tally.rows;
    if (std::any_of(selections.begin(), selections.end(), is_tie)) {
      ++tally.left_out;
      continue;
    }
    for (size_t branch = 0; branch < branches; ++branch) {
      const std::vector<Span> tokens = distinct(result.selections[i * branches + branch]);
      EXPECT_EQ(tokens, selections[branch].tokens)
          << "row " << i << " branch " << branch << ": " << text(tokens) << "reference "
          << text(selections[branch].tokens);
    }
    const auto first = static_cast<std::ptrdiff_t>(i) * value_dim;
    out.insert(out.end(), result.out.begin() + first, result.out.begin() + first + value_dim);
    expected_out.insert(expected_out.end(),
                        reference.out.begin() + first,
                        reference.out.begin() + first + value_dim);
    if (!reference.lse.empty()) {
      lse.push_back(result.lse[i]);
      expected_lse.push_back(reference.lse[i]);
    }
  }
  EXPECT_TRUE(
      outputs_match(out, expected_out, static_cast<size_t>(value_dim), tolerance(shape_.kv_dtype)));
  EXPECT_TRUE(lse_match(lse, expected_lse, tolerance(shape_.kv_dtype)));
}

void ContextModel::ask(const Question& question, const Method& method, Tally& tally) {
  ask_together(group_, {{this, question, &method}}, tally);
}

void ContextModel::ask_together(Group& group, const std::vector<Part>& parts, Tally& tally) {
  std::vector<Numbers> numbers;
  std::vector<AttendItem> items;
  numbers.reserve(parts.size());
  for (const Part& part : parts) {
    numbers.push_back(part.model->make_numbers(part.question, *part.method));
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    items.push_back(parts[i].model->item(parts[i].question, *parts[i].method, numbers[i]));
  }
  const std::vector<AttendResult> results = group.attend(items, far());
  ASSERT_EQ(results.size(), parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    parts[i].model->check(parts[i].question, *parts[i].method, numbers[i], results[i], tally);
  }
}

}  // namespace longspan::testing
