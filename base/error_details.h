// The details of an error (google.rpc messages) as payloads of absl::Status, and their way over
// gRPC.
//
// Every error that leaves the service has an ErrorInfo with a stable reason. An error that names
// none gets the default reason of its code.
#pragma once

#include <chrono>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/support/status.h"

#include "base/status.h"

namespace longspan {

inline constexpr char kErrorDomain[] = "longspan";

struct FieldError {
  std::string field;
  std::string description;
};

// Each answers `status` with one detail more; OK stays OK.
Status with_reason(Status status,
                   absl::string_view reason,
                   const std::map<std::string, std::string>& metadata = {});
Status with_retry(Status status, std::chrono::milliseconds delay);
Status with_quota(Status status, absl::string_view subject, absl::string_view description);

// INVALID_ARGUMENT with every violation as BadRequest; the message repeats the first ones. OK when
// there is none.
Status invalid_argument(const std::vector<FieldError>& violations);
Status invalid_argument(absl::string_view field, absl::string_view description);
// UNIMPLEMENTED, reason UNSUPPORTED, with every reason as BadRequest. OK when there is none.
Status unimplemented(const std::vector<FieldError>& reasons);

// The field errors that a status carries, or names in its message as libraries do.
std::vector<FieldError> field_errors(const Status& status);
// The ErrorInfo reason, or the default of the code; empty for OK.
std::string reason_of(const Status& status);

google::rpc::Status to_rpc_status(const Status& status);
Status from_rpc_status(const google::rpc::Status& status);
// Details travel as grpc-status-details-bin, cut to what fits HTTP/2's header limit.
grpc::Status to_grpc_status(const Status& status);
Status from_grpc_status(const grpc::Status& status);

}  // namespace longspan
