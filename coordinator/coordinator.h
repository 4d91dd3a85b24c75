// The control plane: what CreateContext and its kin do, between the catalogue and the worker.
//
// Thread-safe. Answers through callbacks, as the worker does.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"

#include "longspan/v1/context.pb.h"

#include "base/status.h"
#include "coordinator/catalogue.h"
#include "coordinator/metrics.h"
#include "coordinator/worker_client.h"

namespace longspan {

class Coordinator {
 public:
  using Clock = std::function<Moment()>;
  using ContextDone = WorkerClient::ContextDone;
  using StatusDone = absl::AnyInvocable<void(Status)>;
  using ListDone = absl::AnyInvocable<void(StatusOr<v1::ListContextsResponse>)>;

  Coordinator(WorkerClient& worker, CoordinatorMetrics& metrics, size_t max_contexts, Clock clock);

  void create(const v1::CreateContextRequest& request, ContextDone done);
  void get(const std::string& context_id, ContextDone done);
  void list(const v1::ListContextsRequest& request, ListDone done);
  void remove(const v1::DeleteContextRequest& request, StatusDone done);
  void fork(const v1::ForkContextRequest& request, ContextDone done);
  void truncate(const v1::TruncateContextRequest& request, ContextDone done);
  v1::KeepAliveResponse keep_alive(const v1::KeepAliveRequest& request);

  // Removes the contexts whose lease has run out; called now and then.
  void expire();

  WorkerClient& worker() { return worker_; }

 private:
  // Called with the reservation's outcome under no lock.
  void finish_creation(const std::string& context_id,
                       StatusOr<v1::Context> context,
                       ContextDone& done);
  void begin_and_remove(const v1::DeleteContextRequest& request, StatusDone done);
  // Adds what the catalogue knows to what the worker said. Nothing when it is gone meanwhile.
  bool complete(v1::Context& context);
  void update_metrics();  // under mutex_

  WorkerClient& worker_;
  CoordinatorMetrics& metrics_;
  Clock clock_;
  std::mutex mutex_;  // guards catalogue_; never held while the worker is called
  Catalogue catalogue_;
};

}  // namespace longspan
