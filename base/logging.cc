#include "base/logging.h"

#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "spdlog/sinks/stdout_sinks.h"

#include "base/metrics.h"
#include "nlohmann/json.hpp"

namespace longspan {
namespace {

constexpr size_t kQueueLines = 8192;

spdlog::level::level_enum level_of(const RequestRecord& record) {
  switch (record.status.code()) {
    case absl::StatusCode::kOk:
      return record.part_of_stream ? spdlog::level::debug : spdlog::level::info;
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDataLoss:
      return spdlog::level::err;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kDeadlineExceeded:
      return spdlog::level::warn;
    default:
      return spdlog::level::info;
  }
}

double milliseconds(const RequestRecord& record) {
  return std::chrono::duration<double, std::milli>(record.duration).count();
}

// Without the braces: the pattern adds time and level.
std::string json_fields(const nlohmann::ordered_json& fields) {
  const std::string text =
      fields.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  return text.substr(1, text.size() - 2);
}

std::string json_line(const RequestRecord& record) {
  nlohmann::ordered_json fields;
  fields["op"] = std::string(record.operation);
  fields["code"] = code_name(record.status.code());
  fields["duration_ms"] = milliseconds(record);
  const auto add = [&fields](const char* name, const std::string& value) {
    if (!value.empty()) {
      fields[name] = value;
    }
  };
  add("context", record.context_id);
  add("request_id", record.identity.request_id);
  add("trace_id", record.identity.trace_id);
  add("error", std::string(record.status.message()));
  return json_fields(fields);
}

std::string text_line(const RequestRecord& record) {
  std::string line = absl::StrFormat("%s %s %.3f ms",
                                     std::string(record.operation),
                                     code_name(record.status.code()),
                                     milliseconds(record));
  const auto add = [&line](const char* name, const std::string& value) {
    if (!value.empty()) {
      absl::StrAppend(&line, " ", name, "=", absl::CHexEscape(value));
    }
  };
  add("context", record.context_id);
  add("request", record.identity.request_id);
  add("trace", record.identity.trace_id);
  if (!record.status.ok()) {
    absl::StrAppend(
        &line, " error=\"", absl::CHexEscape(std::string(record.status.message())), "\"");
  }
  return line;
}

}  // namespace

Log::Log(const std::string& level, LogFormat format)
    : format_(format),
      writer_(std::make_shared<spdlog::details::thread_pool>(kQueueLines, 1)),
      logger_(
          std::make_shared<spdlog::async_logger>("longspan",
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>(),
                                                 writer_,
                                                 spdlog::async_overflow_policy::overrun_oldest)) {
  logger_->set_level(spdlog::level::from_str(level));
  logger_->set_pattern(format == LogFormat::kJson
                           ? R"({"time":"%Y-%m-%dT%H:%M:%S.%f%z","level":"%l",%v})"
                           : "%Y-%m-%d %H:%M:%S.%e %l %v");
}

void Log::event(spdlog::level::level_enum level, absl::string_view message) {
  const std::string text(message);
  logger_->log(level,
               "{}",
               format_ == LogFormat::kJson ? json_fields(nlohmann::ordered_json{{"message", text}})
                                           : absl::CHexEscape(text));
}

void Log::request(const RequestRecord& record) {
  const spdlog::level::level_enum level = level_of(record);
  if (logger_->should_log(level)) {
    logger_->log(level, "{}", format_ == LogFormat::kJson ? json_line(record) : text_line(record));
  }
}

}  // namespace longspan
