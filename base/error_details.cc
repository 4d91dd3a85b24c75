#include "base/error_details.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"

namespace longspan {
namespace {

constexpr char kCapacityReason[] = "CAPACITY";
constexpr std::chrono::milliseconds kDefaultRetry{1000};
constexpr char kTypePrefix[] = "type.googleapis.com/";
// The pipeline below knows no protobuf; it attaches the position that a write should have had so.
constexpr char kExpectedPosition[] = "longspan.expected_pos";

// Peers refuse more than 8 KiB of metadata by default, and details travel there as base64.
constexpr size_t kMaxHeaderDetailBytes = 3072;
constexpr size_t kMaxHeaderMessageBytes = 1024;
constexpr size_t kMaxListedViolations = 4;

template <class Detail>
std::string type_url() {
  return absl::StrCat(kTypePrefix, Detail::descriptor()->full_name());
}

template <class Detail>
std::optional<Detail> find_detail(const Status& status) {
  const std::optional<absl::Cord> payload = [&]() -> std::optional<absl::Cord> {
    const auto found = status.GetPayload(type_url<Detail>());
    return found ? std::optional<absl::Cord>(*found) : std::nullopt;
  }();
  Detail detail;
  if (!payload || !detail.ParseFromString(std::string(*payload))) {
    return std::nullopt;
  }
  return detail;
}

template <class Detail>
void set_detail(Status& status, const Detail& detail) {
  status.SetPayload(type_url<Detail>(), absl::Cord(detail.SerializeAsString()));
}

absl::string_view default_reason(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return "";
    case absl::StatusCode::kCancelled:
      return "CANCELLED";
    case absl::StatusCode::kInvalidArgument:
      return "INVALID_FIELD";
    case absl::StatusCode::kDeadlineExceeded:
      return "DEADLINE";
    case absl::StatusCode::kNotFound:
      return "CONTEXT_NOT_FOUND";
    case absl::StatusCode::kAlreadyExists:
      return "CONTEXT_EXISTS";
    case absl::StatusCode::kResourceExhausted:
      return kCapacityReason;
    case absl::StatusCode::kFailedPrecondition:
      return "PRECONDITION";
    case absl::StatusCode::kAborted:
      return "CONFLICT";
    case absl::StatusCode::kOutOfRange:
      return "POSITION";
    case absl::StatusCode::kUnimplemented:
      return "UNSUPPORTED";
    case absl::StatusCode::kUnavailable:
      return "UNAVAILABLE";
    default:
      return "INTERNAL";
  }
}

// Libraries below the service name the field in the message: "layout.stripe_tokens: must be …".
std::optional<FieldError> field_in_message(absl::string_view message) {
  const size_t colon = message.find(": ");
  if (colon == absl::string_view::npos || colon == 0) {
    return std::nullopt;
  }
  const absl::string_view field = message.substr(0, colon);
  const bool is_path = std::all_of(field.begin(), field.end(), [](char c) {
    return absl::ascii_islower(static_cast<unsigned char>(c)) ||
           absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '[' ||
           c == ']';
  });
  if (!is_path) {
    return std::nullopt;
  }
  return FieldError{std::string(field), std::string(message.substr(colon + 2))};
}

google::rpc::BadRequest encode_violations(const std::vector<FieldError>& violations) {
  google::rpc::BadRequest details;
  for (const FieldError& violation : violations) {
    auto* encoded = details.add_field_violations();
    encoded->set_field(violation.field);
    encoded->set_description(violation.description);
  }
  return details;
}

// Where the status comes from below the service, gives it what every error has on the wire.
Status complete(const Status& status) {
  if (status.ok()) {
    return status;
  }
  Status completed = status;
  if (absl::IsInvalidArgument(status) && !find_detail<google::rpc::BadRequest>(status)) {
    if (const std::vector<FieldError> errors = field_errors(status); !errors.empty()) {
      set_detail(completed, encode_violations(errors));
    }
  }
  const bool comes_back = absl::IsUnavailable(status) || (absl::IsResourceExhausted(status) &&
                                                          reason_of(status) == kCapacityReason);
  if (comes_back && !find_detail<google::rpc::RetryInfo>(status)) {
    completed = with_retry(std::move(completed), kDefaultRetry);
  }
  if (!find_detail<google::rpc::ErrorInfo>(status)) {
    std::map<std::string, std::string> metadata;
    if (const auto position = status.GetPayload(kExpectedPosition)) {
      metadata.emplace("expected_pos", std::string(*position));
    }
    completed = with_reason(std::move(completed), default_reason(status.code()), metadata);
  }
  completed.ErasePayload(kExpectedPosition);
  return completed;
}

Status with_violations(absl::StatusCode code, const std::vector<FieldError>& violations) {
  if (violations.empty()) {
    return absl::OkStatus();
  }
  std::string message;
  for (size_t i = 0; i < std::min(violations.size(), kMaxListedViolations); ++i) {
    absl::StrAppend(
        &message, i > 0 ? "; " : "", violations[i].field, ": ", violations[i].description);
  }
  if (violations.size() > kMaxListedViolations) {
    absl::StrAppend(&message, "; and ", violations.size() - kMaxListedViolations, " more");
  }
  Status status(code, message);
  set_detail(status, encode_violations(violations));
  return status;
}

// Drops the last violations until the details fit a header.
std::string header_details(google::rpc::Status status) {
  while (status.ByteSizeLong() > kMaxHeaderDetailBytes) {
    bool shortened = false;
    for (google::protobuf::Any& detail : *status.mutable_details()) {
      google::rpc::BadRequest request;
      if (detail.UnpackTo(&request) && request.field_violations_size() > 1) {
        const int kept = request.field_violations_size() / 2;
        request.mutable_field_violations()->DeleteSubrange(kept,
                                                           request.field_violations_size() - kept);
        detail.PackFrom(request);
        shortened = true;
      }
    }
    if (!shortened) {
      status.mutable_details()->RemoveLast();
    }
  }
  return status.SerializeAsString();
}

}  // namespace

Status with_reason(Status status,
                   absl::string_view reason,
                   const std::map<std::string, std::string>& metadata) {
  if (status.ok()) {
    return status;
  }
  google::rpc::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain(kErrorDomain);
  for (const auto& [key, value] : metadata) {
    (*info.mutable_metadata())[key] = value;
  }
  set_detail(status, info);
  return status;
}

Status with_retry(Status status, std::chrono::milliseconds delay) {
  if (status.ok()) {
    return status;
  }
  google::rpc::RetryInfo info;
  info.mutable_retry_delay()->set_seconds(delay.count() / 1000);
  info.mutable_retry_delay()->set_nanos(static_cast<int32_t>(delay.count() % 1000 * 1'000'000));
  set_detail(status, info);
  return status;
}

Status with_quota(Status status, absl::string_view subject, absl::string_view description) {
  if (status.ok()) {
    return status;
  }
  google::rpc::QuotaFailure failure;
  auto* violation = failure.add_violations();
  violation->set_subject(std::string(subject));
  violation->set_description(std::string(description));
  set_detail(status, failure);
  return status;
}

Status invalid_argument(const std::vector<FieldError>& violations) {
  return with_violations(absl::StatusCode::kInvalidArgument, violations);
}

Status invalid_argument(absl::string_view field, absl::string_view description) {
  return invalid_argument({FieldError{std::string(field), std::string(description)}});
}

Status unimplemented(const std::vector<FieldError>& reasons) {
  return with_violations(absl::StatusCode::kUnimplemented, reasons);
}

std::vector<FieldError> field_errors(const Status& status) {
  std::vector<FieldError> errors;
  if (const auto details = find_detail<google::rpc::BadRequest>(status)) {
    for (const auto& violation : details->field_violations()) {
      errors.push_back({violation.field(), violation.description()});
    }
  } else if (const auto error = field_in_message(status.message());
             error && absl::IsInvalidArgument(status)) {
    errors.push_back(*error);
  }
  return errors;
}

std::string reason_of(const Status& status) {
  const auto info = find_detail<google::rpc::ErrorInfo>(status);
  return info ? info->reason() : std::string(default_reason(status.code()));
}

google::rpc::Status to_rpc_status(const Status& status) {
  const Status completed = complete(status);
  google::rpc::Status message;
  message.set_code(static_cast<int>(completed.code()));
  message.set_message(std::string(completed.message()));
  completed.ForEachPayload([&message](absl::string_view url, const absl::Cord& payload) {
    google::protobuf::Any* detail = message.add_details();
    detail->set_type_url(std::string(url));
    detail->set_value(std::string(payload));
  });
  std::sort(
      message.mutable_details()->pointer_begin(),
      message.mutable_details()->pointer_end(),
      [](const auto* left, const auto* right) { return left->type_url() < right->type_url(); });
  // ErrorInfo first: what is cut to fit is cut from the end.
  std::stable_partition(
      message.mutable_details()->pointer_begin(),
      message.mutable_details()->pointer_end(),
      [](const auto* detail) { return detail->template Is<google::rpc::ErrorInfo>(); });
  return message;
}

Status from_rpc_status(const google::rpc::Status& message) {
  Status status(static_cast<absl::StatusCode>(message.code()), message.message());
  for (const google::protobuf::Any& detail : message.details()) {
    status.SetPayload(detail.type_url(), absl::Cord(detail.value()));
  }
  return status;
}

grpc::Status to_grpc_status(const Status& status) {
  if (status.ok()) {
    return grpc::Status::OK;
  }
  google::rpc::Status message = to_rpc_status(status);
  const std::string text = message.message().substr(0, kMaxHeaderMessageBytes);
  message.set_message(text);
  const auto code = static_cast<grpc::StatusCode>(message.code());
  return {code, text, header_details(std::move(message))};
}

Status from_grpc_status(const grpc::Status& status) {
  google::rpc::Status message;
  if (!status.error_details().empty() && message.ParseFromString(status.error_details()) &&
      message.code() == status.error_code()) {
    return from_rpc_status(message);
  }
  return {static_cast<absl::StatusCode>(status.error_code()), status.error_message()};
}

}  // namespace longspan
