// `longspan explain`: what a method selects for a query, and what that misses.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"

#include "client/cli/commands.h"
#include "client/cli/context_spec.h"
#include "client/cli/npy.h"
#include "client/cli/random_rows.h"
#include "client/cli/text.h"

namespace longspan::cli {
namespace {

using Json = nlohmann::ordered_json;

struct ExplainOptions {
  std::string context_id;
  uint32_t layer = 0;
  std::optional<uint64_t> position;
  std::string method;
  std::string query_file;
  std::string gates_file;
  std::string search_query_file;
  uint64_t seed = 0;
  bool compare = false;
  std::optional<uint32_t> head;
  size_t max_spans = 6;
};

// The method that the request means: it tells which inputs are needed.
StatusOr<v1::Method> method_of(client::Client& server,
                               const v1::ContextSpec& spec,
                               const std::string& name_or_file) {
  const std::string name = name_or_file.empty() ? default_method_name(spec) : name_or_file;
  for (const v1::Method& method : spec.methods()) {
    if (method.name() == name) {
      return method;
    }
  }
  return resolve_method(server, name);
}

// From a file when one is named, else random when it is needed.
Status fill_input(const std::string& file,
                  bool needed,
                  RandomRows& random,
                  client::Rows shape,
                  v1::Tensor* (v1::ExplainRequest::*field)(),
                  v1::ExplainRequest& request) {
  Array array;
  if (!file.empty()) {
    LONGSPAN_RETURN_IF_ERROR(read_npy(file, array));
  } else if (needed) {
    array.rows =
        random.make(array.bytes, shape.dtype, shape.num_tokens, shape.num_heads, shape.dim);
  } else {
    return absl::OkStatus();
  }
  client::fill_tensor(array.rows, *(request.*field)());
  return absl::OkStatus();
}

StatusOr<v1::ExplainRequest> make_request(client::Client& server, const ExplainOptions& options) {
  LONGSPAN_ASSIGN_OR_RETURN(const v1::Context context, server.context(options.context_id).info());
  const v1::ContextSpec& spec = context.spec();
  LONGSPAN_ASSIGN_OR_RETURN(const v1::Method method, method_of(server, spec, options.method));
  v1::ExplainRequest request;
  request.set_layer(options.layer);
  if (options.position) {
    request.set_start_pos(*options.position);
  }
  *request.mutable_method() = method;
  request.set_compare_with_dense(options.compare);

  RandomRows random(options.seed);
  const client::Rows query{.dtype = DataType::kFloat32,
                           .num_tokens = 1,
                           .num_heads = spec.num_query_heads(),
                           .dim = spec.key_head_dim()};
  LONGSPAN_RETURN_IF_ERROR(fill_input(
      options.query_file, true, random, query, &v1::ExplainRequest::mutable_query, request));
  client::Rows shape = query;
  shape.num_tokens = request.query().shape(0);
  LONGSPAN_RETURN_IF_ERROR(fill_input(options.search_query_file,
                                      needs_search_query(method),
                                      random,
                                      shape,
                                      &v1::ExplainRequest::mutable_search_query,
                                      request));
  shape.dim = method.branches_size();
  LONGSPAN_RETURN_IF_ERROR(fill_input(options.gates_file,
                                      needs_gates(method),
                                      random,
                                      shape,
                                      &v1::ExplainRequest::mutable_gates,
                                      request));
  return request;
}

Json explanation_json(const v1::ExplainResponse& response,
                      std::optional<uint32_t> head,
                      uint64_t num_heads) {
  Json rows = Json::array();
  for (const v1::RowSelection& row : response.selections()) {
    if (head && row.query_head() != *head) {
      continue;
    }
    Json spans = Json::array();
    for (const v1::SelectedSpan& span : row.spans()) {
      spans.push_back({{"rank", span.rank()},
                       {"begin", span.begin()},
                       {"end", span.end()},
                       {"score", span.has_score() ? Json(span.score()) : Json(nullptr)},
                       {"mass", span.has_mass() ? Json(span.mass()) : Json(nullptr)}});
    }
    rows.push_back({{"position", row.position()},
                    {"query_head", row.query_head()},
                    {"branch", row.branch()},
                    {"num_tokens", row.num_tokens()},
                    {"spans", spans}});
  }
  // Per row and query head, row-major; empty without a comparison.
  return {{"method", response.method_name()},
          {"read_fraction", response.read_fraction()},
          {"num_query_heads", num_heads},
          {"recall", response.recall()},
          {"relative_error", response.relative_error()},
          {"selections", rows}};
}

// The longest-standing spans first would hide what the search found: show the heaviest, in order.
std::string spans_text(const v1::RowSelection& row, size_t max_spans) {
  std::vector<const v1::SelectedSpan*> spans;
  for (const v1::SelectedSpan& span : row.spans()) {
    spans.push_back(&span);
  }
  std::stable_sort(spans.begin(), spans.end(), [](const auto* a, const auto* b) {
    return a->mass() != b->mass() ? a->mass() > b->mass() : a->score() > b->score();
  });
  const size_t hidden = spans.size() - std::min(spans.size(), max_spans);
  spans.resize(spans.size() - hidden);
  std::sort(spans.begin(), spans.end(), [](const auto* a, const auto* b) {
    return a->begin() < b->begin();
  });
  std::string text;
  for (const v1::SelectedSpan* span : spans) {
    absl::StrAppend(&text, text.empty() ? "" : " ", span->begin(), "-", span->end());
    if (span->has_mass()) {
      absl::StrAppend(&text, "(", format_fixed(100.0 * span->mass(), 1), "%)");
    }
  }
  return hidden == 0 ? text : absl::StrCat(text, " and ", hidden, " more");
}

void print_explanation(const v1::ExplainResponse& response,
                       const ExplainOptions& options,
                       uint64_t num_heads) {
  const bool compared = response.recall_size() > 0;
  std::vector<std::string> headings = {"POSITION", "HEAD", "BRANCH", "TOKENS"};
  if (compared) {
    headings.insert(headings.end(), {"RECALL", "ERROR"});
  }
  headings.emplace_back("SPANS");
  Table table(headings);
  const uint64_t first = response.selections().empty() ? 0 : response.selections(0).position();
  for (const v1::RowSelection& row : response.selections()) {
    if (options.head && row.query_head() != *options.head) {
      continue;
    }
    std::vector<std::string> cells = {format_count(row.position()),
                                      std::to_string(row.query_head()),
                                      std::to_string(row.branch()),
                                      format_count(row.num_tokens())};
    const auto place = static_cast<int>((row.position() - first) * num_heads + row.query_head());
    if (compared && place < response.recall_size() && place < response.relative_error_size()) {
      cells.push_back(format_fixed(response.recall(place), 4));
      cells.push_back(format_fixed(response.relative_error(place), 4));
    }
    cells.push_back(spans_text(row, options.max_spans));
    cells.resize(headings.size());
    table.add(std::move(cells));
  }
  table.print();
  std::printf("\nmethod %s: %s%% of the visible keys read\n",
              response.method_name().c_str(),
              format_fixed(100.0 * response.read_fraction(), 3).c_str());
}

int explain(const Invocation& invocation, const ExplainOptions& options) {
  const auto server = invocation.connect();
  const auto request = make_request(*server, options);
  if (!request.ok()) {
    return report(invocation, request.status());
  }
  const auto response = server->context(options.context_id).explain(*request);
  if (!response.ok()) {
    return report(invocation, response.status());
  }
  const auto num_heads = static_cast<uint64_t>(request->query().shape(1));
  if (invocation.json()) {
    print_json(explanation_json(*response, options.head, num_heads));
  } else {
    print_explanation(*response, options, num_heads);
  }
  return 0;
}

}  // namespace

void add_explain_command(CLI::App& app, Invocation& invocation) {
  auto* command =
      app.add_subcommand("explain", "Show what a method selects for a query, and what that misses");
  auto options = std::make_shared<ExplainOptions>();
  complete_context_ids(invocation,
                       command->add_option("ID", options->context_id, "the context")->required());
  command->add_option("--layer", options->layer, "the layer")->capture_default_str();
  command->add_option("--position", options->position, "of the query; left out: the last token")
      ->check(whole_number());
  complete_method_names(
      invocation,
      command->add_option(
          "--method", options->method, "name or .txtpb file; left out: the context's default"));
  command->add_option("--query",
                      options->query_file,
                      ".npy file, [heads, dim] or [tokens, heads, dim]; left out: random");
  command->add_option("--gates", options->gates_file, ".npy file; left out: random where needed");
  command->add_option(
      "--search-query", options->search_query_file, ".npy file; left out: random where needed");
  command->add_option("--seed", options->seed, "of what is random")
      ->check(whole_number())
      ->capture_default_str();
  command->add_flag("--compare-with-dense",
                    options->compare,
                    "also attend to everything: recall of attention mass, and error");
  command->add_option("--head", options->head, "show one query head only");
  command->add_option("--max-spans", options->max_spans, "spans that a line of the table shows")
      ->capture_default_str();
  command->callback([&invocation, options] {
    invocation.action = [&invocation, options] { return explain(invocation, *options); };
  });
}

}  // namespace longspan::cli
