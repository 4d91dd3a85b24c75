// Ranks that are threads of one process: collectives by copying between their buffers. Carries the
// embedded server, and every test of the pipeline.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "comm/communicator.h"

namespace longspan {

struct InProcessOptions {
  int64_t epoch = 1;
  // Called on the rank's own thread before each of its operations, with the operation's name: a
  // test may wait in it (a slow rank) or answer an error, which fails the communicator on every
  // rank (a lost one).
  std::function<Status(int rank, std::string_view operation)> before_operation;
};

// One communicator a rank, joined with the others. Each is used by one thread at a time; when one
// is destroyed the others' pending and later operations return UNAVAILABLE.
StatusOr<std::vector<std::unique_ptr<Communicator>>> make_in_process_group(
    int size, const InProcessOptions& options = {});

}  // namespace longspan
