// The group that holds contexts, as the coordinator sees it: narrow, and in messages of the wire
// only.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"

#include "longspan/v1/context.pb.h"
#include "longspan/v1/server.pb.h"

#include "base/status.h"

namespace longspan {

// Thread-safe. Callbacks are called once, from any thread, and must not block. The contexts that
// they bring hold what the worker knows: id, lengths, generation, bytes.
class WorkerClient {
 public:
  using ContextDone = absl::AnyInvocable<void(StatusOr<v1::Context>)>;
  using ContextsDone = absl::AnyInvocable<void(StatusOr<std::vector<v1::Context>>)>;

  WorkerClient() = default;
  WorkerClient(const WorkerClient&) = delete;
  WorkerClient& operator=(const WorkerClient&) = delete;
  virtual ~WorkerClient() = default;

  virtual v1::GetCapabilitiesResponse capabilities() const = 0;
  // Every reason against the spec; fields are relative to it.
  virtual v1::CheckSpecResponse check_spec(const v1::ContextSpec& spec) const = 0;

  // Brings the spec too, with everything that the caller left to the server filled in.
  virtual void create(const std::string& context_id,
                      const v1::ContextSpec& spec,
                      ContextDone done) = 0;
  // Unknown contexts are left out.
  virtual void describe(std::vector<std::string> context_ids, ContextsDone done) = 0;
  virtual void fork(const v1::ForkContextRequest& request, ContextDone done) = 0;
  virtual void truncate(const v1::TruncateContextRequest& request, ContextDone done) = 0;
  // Brings the context's last state.
  virtual void remove(const v1::DeleteContextRequest& request, ContextDone done) = 0;

  // Time since a call of the data plane last used the context; zero for an unknown one.
  virtual std::chrono::nanoseconds idle_time(const std::string& context_id) const = 0;
};

}  // namespace longspan
