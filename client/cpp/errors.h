// What the server answers instead of a result, as absl::Status: the code and message, and the
// google.rpc details as payloads under their type URLs.
#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "google/rpc/status.pb.h"
#include <grpcpp/support/status.h>

#include "base/status.h"

namespace longspan::client {

// Of a call: the details travel in the trailing metadata.
Status from_grpc(const grpc::Status& status);
// Of one item or one step of a stream.
Status from_rpc(const google::rpc::Status& status);

// Stable upper-case word; empty when the server gave none.
std::string error_reason(const Status& status);
// What belongs to the reason, such as `expected_pos`.
std::map<std::string, std::string> error_metadata(const Status& status);
// After which the same call may succeed.
std::optional<std::chrono::milliseconds> retry_delay(const Status& status);

struct FieldViolation {
  std::string field;
  std::string description;
};
std::vector<FieldViolation> field_violations(const Status& status);
// Which quota was exceeded, and why.
std::vector<FieldViolation> quota_violations(const Status& status);

// Whether the same call may succeed later: the server is away, or says how long to wait. Every call
// of the service is safe to repeat.
bool is_retryable(const Status& status);

}  // namespace longspan::client
