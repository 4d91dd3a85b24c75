// Repeats calls that the server refuses for a while. Every call of the service is safe to repeat.
#pragma once

#include <chrono>
#include <functional>
#include <optional>

#include <grpcpp/client_context.h>

#include "base/status.h"

namespace longspan::client {

struct Retries {
  // A call with all its repeats; zero: no limit of the client's.
  std::chrono::milliseconds timeout{60'000};
  // Refused attempts are repeated during this time; zero: never.
  std::chrono::milliseconds retry_for{10'000};

  // Runs `attempt` with a fresh context that carries the deadline, until it succeeds, fails for
  // good, or time is up.
  Status call(const std::function<Status(grpc::ClientContext&)>& attempt) const;
};

}  // namespace longspan::client
