#include "base/rpc.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include "grpcpp/impl/codegen/proto_utils.h"

namespace longspan {
namespace {

std::string metadata_value(const grpc::ServerContextBase& context, const char* key) {
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find(key);
  return found == metadata.end() ? std::string()
                                 : std::string(found->second.data(), found->second.size());
}

// Printable and short: what a caller sends ends up in log lines.
std::string log_safe(std::string text) {
  constexpr size_t kMaxLength = 128;
  text.resize(std::min(text.size(), kMaxLength));
  for (char& c : text) {
    c = c > ' ' && c <= '~' && c != '"' && c != '\\' ? c : '_';
  }
  return text;
}

}  // namespace

Status parse_message(const grpc::ByteBuffer& bytes, google::protobuf::Message& message) {
  grpc::ByteBuffer copy(bytes);  // shares the slices
  grpc::ProtoBufferReader reader(&copy);
  if (!reader.status().ok() || !message.ParseFromZeroCopyStream(&reader)) {
    return with_reason(
        absl::InvalidArgumentError(absl::StrCat("the bytes are no message of type ",
                                                message.GetDescriptor()->full_name())),
        "MALFORMED");
  }
  return absl::OkStatus();
}

grpc::ByteBuffer serialize_message(const google::protobuf::Message& message) {
  grpc::ByteBuffer bytes;
  bool own = false;
  const grpc::Status status =
      grpc::GenericSerialize<grpc::ProtoBufferWriter, google::protobuf::Message>(
          message, &bytes, &own);
  LONGSPAN_CHECK(status.ok());
  return bytes;
}

SteadyTime deadline_of(const grpc::ServerContextBase& context, std::chrono::milliseconds fallback) {
  const auto now = std::chrono::steady_clock::now();
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) {
    return now + fallback;
  }
  // Far deadlines would overflow the steady clock's range.
  constexpr std::chrono::hours kFarthest{24 * 365};
  return now +
         std::min<std::chrono::nanoseconds>(deadline - std::chrono::system_clock::now(), kFarthest);
}

RequestIdentity identity_of(const grpc::ServerContextBase& context) {
  RequestIdentity identity;
  identity.request_id = log_safe(metadata_value(context, "x-request-id"));
  // traceparent: version "-" trace-id (32 hexadecimal digits) "-" parent-id "-" flags
  const std::string parent = metadata_value(context, "traceparent");
  constexpr size_t kTraceBegin = 3;
  constexpr size_t kTraceLength = 32;
  if (parent.size() >= kTraceBegin + kTraceLength) {
    identity.trace_id = log_safe(parent.substr(kTraceBegin, kTraceLength));
  }
  return identity;
}

void add_retry_pushback(grpc::ServerContextBase& context, const Status& status) {
  const google::rpc::Status message = to_rpc_status(status);
  for (const google::protobuf::Any& detail : message.details()) {
    google::rpc::RetryInfo info;
    if (detail.UnpackTo(&info)) {
      context.AddTrailingMetadata("grpc-retry-pushback-ms",
                                  absl::StrCat(info.retry_delay().seconds() * 1000 +
                                               info.retry_delay().nanos() / 1'000'000));
    }
  }
}

Status draining_error() {
  constexpr std::chrono::milliseconds kRetryDelay{1000};
  return with_retry(with_reason(absl::UnavailableError("the server is shutting down"), "DRAINING"),
                    kRetryDelay);
}

}  // namespace longspan
