// What a process wants to know of every request, for its log and its metrics.
#pragma once

#include <chrono>
#include <string>

#include "absl/strings/string_view.h"

#include "base/status.h"

namespace longspan {

// What identifies a request to people.
struct RequestIdentity {
  std::string request_id;  // the caller's x-request-id
  std::string trace_id;    // of the caller's W3C traceparent
};

struct RequestRecord {
  absl::string_view operation;  // "Decode", "PrefillChunk", …: one of a fixed set
  std::string context_id;       // empty: none, or many
  RequestIdentity identity;
  Status status;
  std::chrono::nanoseconds duration{0};
  bool part_of_stream = false;  // one step or chunk: counted, but not a log line of its own
};

// Called from any thread. Implemented once, by the composition root.
class RequestObserver {
 public:
  RequestObserver() = default;
  RequestObserver(const RequestObserver&) = delete;
  RequestObserver& operator=(const RequestObserver&) = delete;
  virtual ~RequestObserver() = default;

  virtual void started(absl::string_view operation) = 0;
  virtual void finished(const RequestRecord& record) = 0;
};

}  // namespace longspan
