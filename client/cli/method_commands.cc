// `longspan methods`: what the server ships, and whether a method file would be accepted.
#include <algorithm>
#include <cstdio>
#include <memory>

#include <google/protobuf/text_format.h>
#include <google/protobuf/util/json_util.h>

#include "client/cli/commands.h"
#include "client/cli/context_spec.h"
#include "client/cli/text.h"

namespace longspan::cli {
namespace {

using Json = nlohmann::ordered_json;

// In the field names of the .proto file; 64-bit integers are strings, as protobuf's JSON has them.
StatusOr<Json> method_json(const v1::Method& method) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string text;
  const auto converted = google::protobuf::util::MessageToJsonString(method, &text, options);
  Json json = Json::parse(text, nullptr, false);
  if (!converted.ok() || json.is_discarded()) {
    return absl::InternalError("the method cannot be written as JSON");
  }
  return json;
}

// What a call must bring besides query, key and value.
std::string needs(const v1::Method& method) {
  std::string text = needs_gates(method) ? "gates" : "";
  if (needs_search_query(method)) {
    text += text.empty() ? "search query" : ", search query";
  }
  return text.empty() ? "-" : text;
}

int list_methods(const Invocation& invocation) {
  const auto capabilities = invocation.connect()->capabilities();
  if (!capabilities.ok()) {
    return report(invocation, capabilities.status());
  }
  if (invocation.json()) {
    Json list = Json::array();
    for (const v1::Method& method : capabilities->methods()) {
      list.push_back({{"name", method.name()},
                      {"default", method.name() == capabilities->default_method()},
                      {"branches", method.branches_size()},
                      {"needs_gates", needs_gates(method)},
                      {"needs_search_query", needs_search_query(method)},
                      {"description", method.description()}});
    }
    print_json(list);
    return 0;
  }
  Table table({"NAME", "DEFAULT", "BRANCHES", "NEEDS", "DESCRIPTION"});
  for (const v1::Method& method : capabilities->methods()) {
    table.add({method.name(),
               method.name() == capabilities->default_method() ? "yes" : "",
               std::to_string(method.branches_size()),
               needs(method),
               method.description()});
  }
  table.print();
  return 0;
}

int show_method(const Invocation& invocation, const std::string& name) {
  const auto method = resolve_method(*invocation.connect(), name);
  if (!method.ok()) {
    return report(invocation, method.status());
  }
  if (invocation.json()) {
    const auto json = method_json(*method);
    if (!json.ok()) {
      return report(invocation, json.status());
    }
    print_json(*json);
    return 0;
  }
  std::string text;
  google::protobuf::TextFormat::PrintToString(*method, &text);
  std::fputs(text.c_str(), stdout);
  return 0;
}

struct Check {
  std::string file;
  v1::CheckSpecResponse answer;

  // Wrong (exit code 2) tells more than not served (7).
  bool wrong() const {
    return std::any_of(answer.reasons().begin(), answer.reasons().end(), [](const auto& reason) {
      return reason.code() != "UNIMPLEMENTED";
    });
  }
  bool refused() const { return answer.reasons_size() > 0; }
};

// A file that cannot be read as a method is one reason more.
StatusOr<Check> check_file(client::Client& server, SpecOptions options, const std::string& file) {
  Check check{file, {}};
  if (const auto method = read_method_file(file); !method.ok()) {
    auto& reason = *check.answer.add_reasons();
    reason.set_code("INVALID_ARGUMENT");
    reason.set_description(std::string(method.status().message()));
    return check;
  }
  options.methods = {file};
  LONGSPAN_ASSIGN_OR_RETURN(const auto spec, make_spec(server, options));
  LONGSPAN_ASSIGN_OR_RETURN(check.answer, server.check_spec(spec));
  return check;
}

Json check_json(const Check& check) {
  Json reasons = Json::array();
  for (const auto& reason : check.answer.reasons()) {
    reasons.push_back({{"field", reason.field()},
                       {"description", reason.description()},
                       {"code", reason.code()}});
  }
  return {{"file", check.file},
          {"accepted", check.answer.reasons().empty()},
          {"reasons", reasons},
          {"kv_bytes_per_token", check.answer.kv_bytes_per_token()},
          {"summary_bytes_per_token", check.answer.summary_bytes_per_token()}};
}

void print_check(const Check& check) {
  if (check.answer.reasons().empty()) {
    std::printf("%s: accepted; %s a token in the cache, %s B in summaries\n",
                check.file.c_str(),
                format_bytes(static_cast<double>(check.answer.kv_bytes_per_token())).c_str(),
                format_fixed(check.answer.summary_bytes_per_token(), 2).c_str());
    return;
  }
  std::printf("%s: refused\n", check.file.c_str());
  for (const auto& reason : check.answer.reasons()) {
    std::printf("  %s: %s%s%s\n",
                reason.code().c_str(),
                reason.field().c_str(),
                reason.field().empty() ? "" : ": ",
                reason.description().c_str());
  }
}

int check_files(const Invocation& invocation,
                const SpecOptions& options,
                const std::vector<std::string>& files) {
  const auto server = invocation.connect();
  Json list = Json::array();
  bool wrong = false;
  bool refused = false;
  for (const std::string& file : files) {
    const auto check = check_file(*server, options, file);
    if (!check.ok()) {
      return report(invocation, check.status());
    }
    wrong = wrong || check->wrong();
    refused = refused || check->refused();
    if (invocation.json()) {
      list.push_back(check_json(*check));
    } else {
      print_check(*check);
    }
  }
  if (invocation.json()) {
    print_json(list);
  }
  if (wrong) {
    return exit_code(absl::InvalidArgumentError(""));
  }
  return refused ? exit_code(absl::UnimplementedError("")) : 0;
}

}  // namespace

void add_methods_command(CLI::App& app, Invocation& invocation) {
  auto* group = app.add_subcommand("methods", "List, show and check sparse attention methods");
  group->require_subcommand(1);
  group->add_subcommand("list", "List the methods that the server ships")->callback([&invocation] {
    invocation.action = [&invocation] { return list_methods(invocation); };
  });

  auto* show = group->add_subcommand("show", "Print a method in the format of its file");
  auto name = std::make_shared<std::string>();
  complete_method_names(invocation, show->add_option("NAME", *name, "the method")->required());
  show->callback([&invocation, name] {
    invocation.action = [&invocation, name] { return show_method(invocation, *name); };
  });

  auto* check =
      group->add_subcommand("check", "Ask the server whether it would accept method files");
  auto files = std::make_shared<std::vector<std::string>>();
  auto options = std::make_shared<SpecOptions>();
  check->add_option("FILE", *files, ".txtpb files")->required();
  add_shape_options(*check, *options, invocation, false);
  check->callback([&invocation, files, options] {
    invocation.action = [&invocation, files, options] {
      return check_files(invocation, *options, *files);
    };
  });
}

}  // namespace longspan::cli
