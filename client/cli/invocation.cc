#include "client/cli/invocation.h"

#include <cstdio>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include <CLI/TypeTools.hpp>
#include <nlohmann/json.hpp>

#include "client/cpp/errors.h"

namespace longspan::cli {
namespace {

using std::chrono::milliseconds;

// What the user can do about an error.
std::string hint(const Invocation& invocation, const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
      return "is a server running at " + invocation.server +
             "? Start one with `longspan serve`, or name another with --server or LONGSPAN_SERVER";
    case absl::StatusCode::kDeadlineExceeded:
      return "the server is busy or the work is large: raise --timeout";
    case absl::StatusCode::kNotFound:
      return "`longspan context list` and `longspan methods list` show what the server has";
    case absl::StatusCode::kAlreadyExists:
      return "choose another id, or delete the context that has it";
    case absl::StatusCode::kAborted:
      return "look at the context again with `longspan context get`, then repeat";
    case absl::StatusCode::kResourceExhausted:
      return "delete contexts that are no longer needed, or raise the limit in the server's "
             "configuration (`longspan config print`)";
    case absl::StatusCode::kUnimplemented:
      return "`longspan methods list` shows the methods that this server serves";
    default:
      return "";
  }
}

nlohmann::ordered_json violations_json(const std::vector<client::FieldViolation>& violations) {
  auto list = nlohmann::ordered_json::array();
  for (const auto& violation : violations) {
    list.push_back({{"field", violation.field}, {"description", violation.description}});
  }
  return list;
}

void report_json(const Status& status, const std::string& advice) {
  nlohmann::ordered_json error;
  error["code"] = absl::StatusCodeToString(status.code());
  error["message"] = std::string(status.message());
  error["reason"] = client::error_reason(status);
  error["metadata"] = client::error_metadata(status);
  error["field_violations"] = violations_json(client::field_violations(status));
  error["quota_violations"] = violations_json(client::quota_violations(status));
  if (const auto delay = client::retry_delay(status)) {
    error["retry_delay_seconds"] = static_cast<double>(delay->count()) / 1e3;
  }
  error["hint"] = advice;
  const nlohmann::ordered_json document = {{"error", error}};
  std::fprintf(
      stderr,
      "%s\n",
      document.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace).c_str());
}

// Asks quickly and gives up quickly: the user is waiting at a prompt.
std::unique_ptr<client::Client> connect_for_completion(const Invocation& invocation) {
  return std::make_unique<client::Client>(
      invocation.server, client::Retries{.timeout = milliseconds(500), .retry_for = {}});
}

}  // namespace

const char* const kExitCodeHelp =
    "Exit codes:\n"
    "  0  success\n"
    "  1  internal error, data loss, or cancelled\n"
    "  2  wrong usage, or an argument that the server refuses\n"
    "  3  not found\n"
    "  4  precondition not met, or a conflict with what exists\n"
    "  5  server unavailable, or out of time\n"
    "  6  capacity, quota or queue exhausted\n"
    "  7  not served by this server\n";

std::unique_ptr<client::Client> Invocation::connect() const {
  const milliseconds timeout(static_cast<int64_t>(timeout_seconds * 1e3));
  // A person is waiting: a server that is away is reported after a few tries.
  const client::Retries retries{.timeout = timeout, .retry_for = milliseconds(2'000)};
  return std::make_unique<client::Client>(server, retries);
}

CLI::Validator positive() {
  return {[](std::string& text) -> std::string {
            double value = 0;
            const bool fits = CLI::detail::lexical_cast(text, value) && value > 0;
            return fits ? "" : text + " is not a number above 0";
          },
          "ABOVE 0"};
}

CLI::Validator whole_number(int64_t minimum) {
  return {[minimum](std::string& text) -> std::string {
            int64_t value = 0;
            const bool fits = absl::SimpleAtoi(text, &value) && value >= minimum;
            return fits ? "" : absl::StrCat(text, " is not a whole number of at least ", minimum);
          },
          ""};
}

void limit_to(Invocation& invocation, CLI::Option* option, std::vector<std::string> values) {
  option->check(CLI::IsMember(values));
  invocation.choices[option] = [values = std::move(values)] { return values; };
}

void complete_context_ids(Invocation& invocation, CLI::Option* option) {
  invocation.choices[option] = [&invocation] {
    std::vector<std::string> ids;
    const auto contexts = connect_for_completion(invocation)->contexts();
    for (const v1::Context& context : contexts.ok() ? *contexts : std::vector<v1::Context>()) {
      ids.push_back(context.context_id());
    }
    return ids;
  };
}

void complete_method_names(Invocation& invocation, CLI::Option* option) {
  invocation.choices[option] = [&invocation] {
    std::vector<std::string> names;
    const auto capabilities = connect_for_completion(invocation)->capabilities();
    if (capabilities.ok()) {
      for (const v1::Method& method : capabilities->methods()) {
        names.push_back(method.name());
      }
    }
    return names;
  };
}

int report(const Invocation& invocation, const Status& status) {
  const std::string advice = hint(invocation, status);
  if (invocation.json()) {
    report_json(status, advice);
    return exit_code(status);
  }
  std::fprintf(stderr,
               "longspan: %s: %s\n",
               absl::StatusCodeToString(status.code()).c_str(),
               std::string(status.message()).c_str());
  for (const auto& violation : client::field_violations(status)) {
    std::fprintf(stderr, "  %s: %s\n", violation.field.c_str(), violation.description.c_str());
  }
  for (const auto& violation : client::quota_violations(status)) {
    std::fprintf(stderr, "  %s: %s\n", violation.field.c_str(), violation.description.c_str());
  }
  if (const auto delay = client::retry_delay(status)) {
    std::fprintf(stderr, "  try again in %.3g s\n", static_cast<double>(delay->count()) / 1e3);
  }
  if (!advice.empty()) {
    std::fprintf(stderr, "hint: %s\n", advice.c_str());
  }
  return exit_code(status);
}

int exit_code(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
      return 2;
    case absl::StatusCode::kNotFound:
      return 3;
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kAlreadyExists:
      return 4;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
      return 5;
    case absl::StatusCode::kResourceExhausted:
      return 6;
    case absl::StatusCode::kUnimplemented:
      return 7;
    default:
      return 1;
  }
}

}  // namespace longspan::cli
