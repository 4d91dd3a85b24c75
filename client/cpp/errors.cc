#include "client/cpp/errors.h"

#include <string_view>

#include "absl/strings/cord.h"
#include "google/rpc/error_details.pb.h"

namespace longspan::client {
namespace {

constexpr std::string_view kTypePrefix = "type.googleapis.com/";

// The detail of type Message that `status` carries, if any.
template <typename Message>
std::optional<Message> detail(const Status& status) {
  const std::string url = std::string(kTypePrefix) + Message::descriptor()->full_name();
  const auto payload = status.GetPayload(url);
  Message message;
  if (!payload || !message.ParseFromString(std::string(*payload))) {
    return std::nullopt;
  }
  return message;
}

}  // namespace

Status from_rpc(const google::rpc::Status& status) {
  Status result(static_cast<absl::StatusCode>(status.code()), status.message());
  if (result.ok()) {
    return result;
  }
  for (const auto& any : status.details()) {
    result.SetPayload(any.type_url(), absl::Cord(any.value()));
  }
  return result;
}

Status from_grpc(const grpc::Status& status) {
  google::rpc::Status details;
  if (details.ParseFromString(status.error_details()) &&
      details.code() == static_cast<int>(status.error_code())) {
    return from_rpc(details);
  }
  return {static_cast<absl::StatusCode>(status.error_code()), status.error_message()};
}

std::string error_reason(const Status& status) {
  const auto info = detail<google::rpc::ErrorInfo>(status);
  return info ? info->reason() : "";
}

std::map<std::string, std::string> error_metadata(const Status& status) {
  const auto info = detail<google::rpc::ErrorInfo>(status);
  if (!info) {
    return {};
  }
  return {info->metadata().begin(), info->metadata().end()};
}

std::optional<std::chrono::milliseconds> retry_delay(const Status& status) {
  const auto retry = detail<google::rpc::RetryInfo>(status);
  if (!retry) {
    return std::nullopt;
  }
  return std::chrono::seconds(retry->retry_delay().seconds()) +
         std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::nanoseconds(retry->retry_delay().nanos()));
}

std::vector<FieldViolation> field_violations(const Status& status) {
  std::vector<FieldViolation> violations;
  if (const auto request = detail<google::rpc::BadRequest>(status)) {
    for (const auto& violation : request->field_violations()) {
      violations.push_back({violation.field(), violation.description()});
    }
  }
  return violations;
}

std::vector<FieldViolation> quota_violations(const Status& status) {
  std::vector<FieldViolation> violations;
  if (const auto quota = detail<google::rpc::QuotaFailure>(status)) {
    for (const auto& violation : quota->violations()) {
      violations.push_back({violation.subject(), violation.description()});
    }
  }
  return violations;
}

bool is_retryable(const Status& status) {
  return absl::IsUnavailable(status) || retry_delay(status).has_value();
}

}  // namespace longspan::client
