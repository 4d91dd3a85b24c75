// reference_runner FOLDER: runs the reference pipeline on FOLDER/problem.json and the raw
// little-endian tensors beside it, and writes out.f64, lse.f64 and selections.json there. The
// bridge from the Python oracles to C++; bad input ends it with a message.
#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "kernels/anchors.h"
#include "kernels/reference/pipeline.h"

namespace longspan {
namespace {

using Json = nlohmann::json;

template <typename Enum, size_t count>
Enum named(const Json& object,
           const char* field,
           const std::array<std::pair<const char*, Enum>, count>& names) {
  if (!object.contains(field)) {
    return names[0].second;
  }
  const auto name = object[field].get<std::string>();
  for (const auto& [known, value] : names) {
    if (name == known) {
      return value;
    }
  }
  throw std::runtime_error(std::string(field) + ": unknown value " + name);
}

template <typename Value>
Value optional(const Json& object, const char* field, Value fallback) {
  return object.contains(field) ? object[field].get<Value>() : fallback;
}

Rational rational(const Json& object, const char* field) {
  return rational_from_double(object.at(field).get<double>()).value();
}

SummarySpec read_summary(const Json& object) {
  SummarySpec summary;
  summary.kind = named<SummaryKind, 4>(object,
                                       "kind",
                                       {{{"none", SummaryKind::kNone},
                                         {"mean", SummaryKind::kMean},
                                         {"min_max", SummaryKind::kMinMax},
                                         {"compressed", SummaryKind::kCompressed}}});
  summary.block_tokens = optional(object, "block_tokens", 0);
  summary.window_tokens = optional(object, "window_tokens", 0);
  summary.stride_tokens = optional(object, "stride_tokens", 0);
  summary.key_weights = optional(object, "key_weights", std::vector<float>{});
  summary.value_weights = optional(object, "value_weights", std::vector<float>{});
  summary.scale_by_sqrt_length = optional(object, "scale_by_sqrt_length", false);
  return summary;
}

SearchSpec read_search(const Json& object) {
  SearchSpec search;
  search.query = named<QuerySource, 2>(
      object,
      "query",
      {{{"attention", QuerySource::kAttention}, {"supplied", QuerySource::kSupplied}}});
  search.query_reduce = named<QueryReduce, 3>(object,
                                              "query_reduce",
                                              {{{"none", QueryReduce::kNone},
                                                {"group_mean", QueryReduce::kGroupMean},
                                                {"all_mean", QueryReduce::kAllMean}}});
  search.score = named<ScoreKind, 2>(
      object, "score", {{{"dot", ScoreKind::kDot}, {"bound", ScoreKind::kBound}}});
  search.normalise = named<Normalise, 2>(
      object, "normalise", {{{"raw", Normalise::kRaw}, {"softmax", Normalise::kSoftmax}}});
  search.head_reduce = named<HeadReduce, 7>(object,
                                            "head_reduce",
                                            {{{"none", HeadReduce::kNone},
                                              {"group_sum", HeadReduce::kGroupSum},
                                              {"group_mean", HeadReduce::kGroupMean},
                                              {"group_max", HeadReduce::kGroupMax},
                                              {"all_sum", HeadReduce::kAllSum},
                                              {"all_mean", HeadReduce::kAllMean},
                                              {"all_max", HeadReduce::kAllMax}}});
  if (object.contains("anchors")) {
    search.view = SearchView::kAnchor;
    search.anchor_power = rational(object["anchors"], "power");
    search.anchor_first_stripe = object["anchors"].at("first_stripe").get<int64_t>();
  }
  return search;
}

SelectionSpec read_selection(const Json& object) {
  SelectionSpec selection;
  selection.kind = named<SelectionKind, 3>(object,
                                           "kind",
                                           {{{"none", SelectionKind::kNone},
                                             {"all", SelectionKind::kAll},
                                             {"top_k", SelectionKind::kTopK}}});
  selection.block_tokens = optional(object, "block_tokens", 0);
  selection.forced_first_blocks = optional(object, "forced_first_blocks", 0);
  selection.forced_last_blocks = optional(object, "forced_last_blocks", 1);
  selection.forced_within_budget = optional(object, "forced_within_budget", false);
  if (object.contains("spans")) {
    selection.spans = true;
    selection.span_power = rational(object["spans"], "power");
    selection.span_backward = rational(object["spans"], "backward");
    selection.span_forward = rational(object["spans"], "forward");
  }
  return selection;
}

Amount read_amount(const Json& object) {
  Amount amount;
  amount.kind = named<Amount::Kind, 3>(object,
                                       "kind",
                                       {{{"blocks", Amount::Kind::kBlocks},
                                         {"tokens", Amount::Kind::kTokens},
                                         {"ratio", Amount::Kind::kRatio}}});
  amount.value = optional(object, "value", 0.0);
  amount.min_blocks = optional(object, "min_blocks", int64_t{0});
  amount.max_blocks = optional(object, "max_blocks", int64_t{0});
  return amount;
}

Branch read_branch(const Json& object) {
  const auto part = [&](const char* field) { return optional(object, field, Json::object()); };
  Branch branch;
  branch.source = named<BranchSource, 2>(
      object,
      "source",
      {{{"tokens", BranchSource::kTokens}, {"summaries", BranchSource::kSummaries}}});
  branch.summary = read_summary(part("summary"));
  branch.search = read_search(part("search"));
  branch.selection = read_selection(part("selection"));
  branch.mask.window_tokens = optional(object, "window_tokens", int64_t{0});
  branch.mask.sink_tokens = optional(object, "sink_tokens", int64_t{0});
  branch.budget.prefill = read_amount(part("prefill"));
  branch.budget.decode = read_amount(part("decode"));
  return branch;
}

Method read_method(const Json& object) {
  Method method;
  for (const Json& branch : object.at("branches")) {
    method.branches.push_back(read_branch(branch));
  }
  method.merge = named<MergeKind, 3>(object,
                                     "merge",
                                     {{{"lse", MergeKind::kLse},
                                       {"gates", MergeKind::kGates},
                                       {"span_scores", MergeKind::kSpanScores}}});
  method.dense_layers = optional(object, "dense_layers", std::vector<int>{});
  method.dense_prefill = optional(object, "dense_prefill", false);
  method.dense_decode = optional(object, "dense_decode", false);
  method.dense_below_tokens = optional(object, "dense_below_tokens", int64_t{0});
  for (const FieldViolation& violation : validate(method)) {
    throw std::runtime_error(violation.field + ": " + violation.description);
  }
  return method;
}

// A tensor file of exactly `count` elements; empty when it does not exist and is optional.
template <typename Element>
std::vector<Element> read_tensor(const std::string& path, int64_t count, bool required = true) {
  std::ifstream file(path, std::ios::binary);
  if (!file && !required) {
    return {};
  }
  std::vector<Element> elements(static_cast<size_t>(count));
  const auto num_bytes = static_cast<std::streamsize>(elements.size() * sizeof(Element));
  file.read(reinterpret_cast<char*>(elements.data()), num_bytes);
  if (!file || file.peek() != std::ifstream::traits_type::eof()) {
    throw std::runtime_error(path + ": must hold " + std::to_string(count) + " elements");
  }
  return elements;
}

void write_tensor(const std::string& path, const std::vector<double>& elements) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(elements.data()),
             static_cast<std::streamsize>(elements.size() * sizeof(double)));
}

// [rows * heads * branches] lists.
Json selections_json(const ReferenceResult& result) {
  Json lists = Json::array();
  for (const ReferenceSelection& selection : result.selections) {
    Json selected = Json::array();
    for (const ReferenceSelected& item : selection.selected) {
      selected.push_back({item.id, item.tokens.begin, item.tokens.end, item.forced});
    }
    Json tokens = Json::array();
    for (const Span& span : selection.tokens) {
      tokens.push_back({span.begin, span.end});
    }
    lists.push_back({{"selected", selected}, {"tokens", tokens}});
  }
  return lists;
}

const float* data_or_null(const std::vector<float>& elements) {
  return elements.empty() ? nullptr : elements.data();
}

void run(const std::string& folder) {
  const Json json = Json::parse(std::ifstream(folder + "/problem.json"));
  const Method method = read_method(json.at("method"));
  ReferenceProblem problem;
  problem.method = &method;
  problem.phase =
      named<Phase, 2>(json, "phase", {{{"decode", Phase::kDecode}, {"prefill", Phase::kPrefill}}});
  problem.layer = optional(json, "layer", 0);
  problem.num_query_heads = json.at("num_query_heads");
  problem.num_kv_heads = json.at("num_kv_heads");
  problem.key_dim = json.at("key_dim");
  problem.value_dim = json.at("value_dim");
  problem.kv_dtype = named<DataType, 3>(json,
                                        "kv_dtype",
                                        {{{"fp32", DataType::kFloat32},
                                          {"fp16", DataType::kFloat16},
                                          {"bf16", DataType::kBFloat16}}});
  problem.scale = json.at("scale");
  problem.soft_cap = optional(json, "soft_cap", 0.0);
  problem.num_tokens = json.at("num_tokens");
  problem.num_rows = json.at("num_rows");

  const int64_t token_heads = problem.num_tokens * problem.num_kv_heads;
  const int64_t row_heads = problem.num_rows * problem.num_query_heads;
  const auto tensor = [&](const char* name, int64_t count, bool required) {
    return read_tensor<float>(folder + "/" + name + ".f32", count, required);
  };
  const auto keys = tensor("keys", token_heads * problem.key_dim, true);
  const auto values = tensor("values", token_heads * problem.value_dim, true);
  const auto query = tensor("query", row_heads * problem.key_dim, true);
  const auto search_query = tensor("search_query", row_heads * problem.key_dim, false);
  const auto gates =
      tensor("gates", row_heads * static_cast<int64_t>(method.branches.size()), false);
  const auto sink_logits = tensor("sink_logits", problem.num_query_heads, false);
  const auto positions = read_tensor<int64_t>(folder + "/positions.i64", problem.num_rows);
  problem.keys = keys.data();
  problem.values = values.data();
  problem.query = query.data();
  problem.search_query = data_or_null(search_query);
  problem.gates = data_or_null(gates);
  problem.sink_logits = data_or_null(sink_logits);
  problem.positions = positions.data();
  if ((method.needs_search_query() && search_query.empty()) ||
      (method.needs_gates() && gates.empty())) {
    throw std::runtime_error("the method needs a search query or gates");
  }

  const ReferenceResult result = run_reference(problem);
  write_tensor(folder + "/out.f64", result.out);
  write_tensor(folder + "/lse.f64", result.lse);
  std::ofstream(folder + "/selections.json") << selections_json(result).dump();
}

}  // namespace
}  // namespace longspan

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  try {
    longspan::run(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
    return 1;
  }
  return 0;
}
