#include "coordinator/coordinator.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/util/time_util.h"

#include "base/error_details.h"

namespace longspan {
namespace {

constexpr uint32_t kDefaultPageSize = 100;
constexpr uint32_t kMaxPageSize = 1000;
constexpr size_t kMaxLeases = 1000;

google::protobuf::Timestamp encode_time(SystemTime time) {
  return google::protobuf::util::TimeUtil::NanosecondsToTimestamp(
      std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count());
}

google::protobuf::Duration encode_duration(std::chrono::nanoseconds duration) {
  return google::protobuf::util::TimeUtil::NanosecondsToDuration(duration.count());
}

Status missing_context(const std::string& context_id) {
  return with_reason(absl::NotFoundError(absl::StrCat("there is no context \"", context_id, "\"")),
                     "CONTEXT_NOT_FOUND",
                     {{"context_id", context_id}});
}

// Time until the lease runs out. Uses count like renewals.
std::chrono::nanoseconds remaining_lease(const ContextRecord& record,
                                         const WorkerClient& worker,
                                         SteadyTime now) {
  const auto since =
      std::min<std::chrono::nanoseconds>(now - record.renewed, worker.idle_time(record.context_id));
  return *record.ttl() - since;
}

}  // namespace

Coordinator::Coordinator(WorkerClient& worker,
                         CoordinatorMetrics& metrics,
                         size_t max_contexts,
                         Clock clock)
    : worker_(worker), metrics_(metrics), clock_(std::move(clock)), catalogue_(max_contexts) {}

void Coordinator::create(const v1::CreateContextRequest& request, ContextDone done) {
  if (!request.has_spec()) {
    done(invalid_argument("spec", "is missing"));
    return;
  }
  ContextRecord record;
  record.context_id = request.context_id();
  record.request_id = request.request_id();
  record.asked = request.spec();
  StatusOr<Catalogue::Reservation> reservation = [&] {
    const std::lock_guard lock(mutex_);
    auto outcome = catalogue_.reserve(record, clock_());
    update_metrics();
    return outcome;
  }();
  if (!reservation.ok()) {
    done(reservation.status());
  } else if (*reservation == Catalogue::Reservation::kExists) {
    get(record.context_id, std::move(done));
  } else {
    worker_.create(record.context_id,
                   record.asked,
                   [this, id = record.context_id, done = std::move(done)](
                       StatusOr<v1::Context> context) mutable {
                     finish_creation(id, std::move(context), done);
                   });
  }
}

void Coordinator::finish_creation(const std::string& context_id,
                                  StatusOr<v1::Context> context,
                                  ContextDone& done) {
  {
    const std::lock_guard lock(mutex_);
    if (context.ok()) {
      catalogue_.confirm(context_id, context->spec());
    } else {
      catalogue_.drop(context_id);
    }
    update_metrics();
  }
  if (context.ok()) {
    complete(*context);
  }
  done(std::move(context));
}

void Coordinator::get(const std::string& context_id, ContextDone done) {
  worker_.describe({context_id},
                   [this, context_id, done = std::move(done)](
                       StatusOr<std::vector<v1::Context>> contexts) mutable {
                     if (!contexts.ok()) {
                       done(contexts.status());
                     } else if (contexts->empty() || !complete(contexts->front())) {
                       done(missing_context(context_id));
                     } else {
                       done(std::move(contexts->front()));
                     }
                   });
}

void Coordinator::list(const v1::ListContextsRequest& request, ListDone done) {
  std::string after;
  if (!absl::WebSafeBase64Unescape(request.page_token(), &after)) {
    done(invalid_argument("page_token", "is none that this server gave"));
    return;
  }
  const size_t page_size =
      request.page_size() == 0 ? kDefaultPageSize : std::min(request.page_size(), kMaxPageSize);
  std::vector<std::string> ids;
  bool more = false;
  {
    const std::lock_guard lock(mutex_);
    for (const ContextRecord* record : catalogue_.list(after, page_size + 1)) {
      if (ids.size() == page_size) {
        more = true;
      } else {
        ids.push_back(record->context_id);
      }
    }
  }
  const std::string next_token = more ? absl::WebSafeBase64Escape(ids.back()) : "";
  worker_.describe(std::move(ids),
                   [this, next_token, done = std::move(done)](
                       StatusOr<std::vector<v1::Context>> contexts) mutable {
                     if (!contexts.ok()) {
                       done(contexts.status());
                       return;
                     }
                     v1::ListContextsResponse response;
                     response.set_next_page_token(next_token);
                     for (v1::Context& context : *contexts) {
                       if (complete(context)) {
                         *response.add_contexts() = std::move(context);
                       }
                     }
                     done(std::move(response));
                   });
}

void Coordinator::remove(const v1::DeleteContextRequest& request, StatusDone done) {
  const Status status = [&] {
    const std::lock_guard lock(mutex_);
    return catalogue_.begin_removal(request.context_id());
  }();
  if (absl::IsNotFound(status) && request.allow_missing()) {
    done(absl::OkStatus());
  } else if (!status.ok()) {
    done(status);
  } else {
    begin_and_remove(request, std::move(done));
  }
}

void Coordinator::begin_and_remove(const v1::DeleteContextRequest& request, StatusDone done) {
  worker_.remove(request,
                 [this, id = request.context_id(), done = std::move(done)](
                     const StatusOr<v1::Context>& context) mutable {
                   // A worker that does not know it has nothing left of it either.
                   const bool gone = context.ok() || absl::IsNotFound(context.status());
                   {
                     const std::lock_guard lock(mutex_);
                     if (gone) {
                       catalogue_.drop(id);
                     } else {
                       catalogue_.cancel_removal(id);
                     }
                     update_metrics();
                   }
                   if (context.ok()) {
                     metrics_.ended(context->committed_length());
                   }
                   done(gone ? absl::OkStatus() : context.status());
                 });
}

void Coordinator::fork(const v1::ForkContextRequest& request, ContextDone done) {
  ContextRecord record;
  record.context_id = request.new_context_id();
  record.request_id = request.request_id();
  record.parent_id = request.context_id();
  record.forked_tokens = request.num_tokens();
  StatusOr<Catalogue::Reservation> reservation = [&]() -> StatusOr<Catalogue::Reservation> {
    const std::lock_guard lock(mutex_);
    LONGSPAN_ASSIGN_OR_RETURN(const ContextRecord* parent, catalogue_.find(request.context_id()));
    record.asked = parent->spec;
    auto outcome = catalogue_.reserve(record, clock_());
    update_metrics();
    return outcome;
  }();
  if (!reservation.ok()) {
    done(reservation.status());
  } else if (*reservation == Catalogue::Reservation::kExists) {
    get(record.context_id, std::move(done));
  } else {
    v1::ForkContextRequest named = request;
    named.set_new_context_id(record.context_id);
    worker_.fork(named,
                 [this, id = record.context_id, spec = record.asked, done = std::move(done)](
                     StatusOr<v1::Context> context) mutable {
                   if (context.ok()) {
                     *context->mutable_spec() = std::move(spec);
                   }
                   finish_creation(id, std::move(context), done);
                 });
  }
}

void Coordinator::truncate(const v1::TruncateContextRequest& request, ContextDone done) {
  worker_.truncate(request,
                   [this, id = request.context_id(), done = std::move(done)](
                       StatusOr<v1::Context> context) mutable {
                     if (context.ok() && !complete(*context)) {
                       context = missing_context(id);
                     }
                     done(std::move(context));
                   });
}

v1::KeepAliveResponse Coordinator::keep_alive(const v1::KeepAliveRequest& request) {
  v1::KeepAliveResponse response;
  const Moment now = clock_();
  const std::lock_guard lock(mutex_);
  for (const std::string& id : request.context_ids()) {
    if (static_cast<size_t>(response.leases_size()) == kMaxLeases) {
      break;
    }
    v1::KeepAliveResponse::Lease& lease = *response.add_leases();
    lease.set_context_id(id);
    if (const Status status = catalogue_.renew(id, now.steady); !status.ok()) {
      *lease.mutable_status() = to_rpc_status(status);
    } else if (const auto ttl = (*catalogue_.find(id))->ttl(); ttl) {
      *lease.mutable_remaining() = encode_duration(*ttl);
    }
  }
  return response;
}

void Coordinator::expire() {
  std::vector<std::string> ids;
  {
    const std::lock_guard lock(mutex_);
    const SteadyTime now = clock_().steady;
    for (const std::string& id : catalogue_.overdue(now)) {
      const ContextRecord& record = **catalogue_.find(id);
      if (remaining_lease(record, worker_, now) <= std::chrono::nanoseconds::zero() &&
          catalogue_.begin_removal(id).ok()) {
        ids.push_back(id);
      }
    }
  }
  for (const std::string& id : ids) {
    v1::DeleteContextRequest request;
    request.set_context_id(id);
    begin_and_remove(request, [](const Status&) {});
  }
}

bool Coordinator::complete(v1::Context& context) {
  const Moment now = clock_();
  const std::lock_guard lock(mutex_);
  const StatusOr<const ContextRecord*> record = catalogue_.find(context.context_id());
  if (!record.ok()) {
    return false;
  }
  *context.mutable_spec() = (*record)->spec;
  *context.mutable_create_time() = encode_time((*record)->created);
  if ((*record)->ttl()) {
    const auto remaining = remaining_lease(**record, worker_, now.steady);
    *context.mutable_expire_time() =
        encode_time(now.system + std::chrono::duration_cast<SystemTime::duration>(remaining));
  }
  return true;
}

void Coordinator::update_metrics() {
  const size_t ready = catalogue_.num_ready();
  metrics_.set_contexts(ready, catalogue_.num_contexts() - ready);
}

}  // namespace longspan
