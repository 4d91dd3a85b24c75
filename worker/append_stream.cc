#include "worker/append_stream.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "base/error_details.h"
#include "base/rpc.h"
#include "worker/call_codec.h"

namespace longspan {
namespace {

// Chunks that are read and not stored yet: enough to keep the engine busy, few enough to bound
// memory and to leave the smallest queues (8 jobs in the tests) room for others' jobs.
constexpr int kWindow = 4;

class AppendStream final : public grpc::ServerReadReactor<grpc::ByteBuffer>,
                           private StreamSet::Member {
 public:
  AppendStream(const ServiceEnvironment& environment,
               grpc::CallbackServerContext* context,
               grpc::ByteBuffer* response)
      : environment_(environment),
        context_(context),
        response_(response),
        started_(std::chrono::steady_clock::now()) {
    record_.operation = "Append";
    environment_.observer.started(record_.operation);
    environment_.streams.add(this);
    update([] {});
  }

 private:
  // What the stream is doing once it reads no more. What a stage starts may answer at once, on the
  // same thread, so it is started outside the lock.
  enum class End : uint8_t { kNone, kProving, kCommitting, kRollingBack, kFinished };

  void OnReadDone(bool ok) override {
    bool take_message = false;
    update([&] {
      reading_ = false;
      reads_ended_ = reads_ended_ || !ok;
      take_message = ok && !failure_ && end_ == End::kNone;
      handling_ = take_message;
      pending_ += take_message ? 1 : 0;
    });
    if (!take_message) {
      return;
    }
    auto request = std::make_unique<v1::AppendRequest>();
    Status status = parse_message(read_bytes_, *request);
    read_bytes_.Clear();
    if (status.ok()) {
      status = take(std::move(request));
    }
    update([&] {
      handling_ = false;
      end_pending(status);
    });
  }

  void OnCancel() override {
    cancelled_.store(true, std::memory_order_relaxed);
    settle_failure(absl::CancelledError("the stream broke"));
  }

  void OnSendInitialMetadataDone(bool ok) override {
    update([&] {
      end_ = End::kNone;
      proven_ = ok;
      if (!ok && !failure_) {
        failure_ = absl::CancelledError("the stream broke");
      }
    });
  }

  void OnDone() override {
    environment_.streams.remove(this);
    // Whoever changed the state last may still hold the lock.
    { const std::lock_guard lock(mutex_); }
    record_.identity = identity_of(*context_);
    record_.duration = std::chrono::steady_clock::now() - started_;
    environment_.observer.finished(record_);
    delete this;
  }

  void drain() override { settle_failure(draining_error()); }

  void end_if_stalled(std::chrono::steady_clock::time_point now) override {
    update([&] {
      if (reading_ && now - read_started_ > environment_.append_deadline && !failure_) {
        failure_ = absl::DeadlineExceededError("no chunk came for too long");
      }
    });
  }

  // One message, on a gRPC thread; the next one is read after it.
  Status take(std::unique_ptr<v1::AppendRequest> request) {
    const CallTerms terms{.deadline = deadline_of(*context_, environment_.append_deadline),
                          .cancelled = &cancelled_};
    if (target_ == nullptr) {
      if (!request->has_header()) {
        return invalid_argument("header", "must come first");
      }
      LONGSPAN_ASSIGN_OR_RETURN(target_, environment_.lead.find(request->header().context_id()));
      record_.context_id = target_->id();
      session_ = environment_.lead.new_append_session();
      CallTerms begin = terms;
      begin.expected_generation = request->header().expected_generation();
      add_pending();
      environment_.lead.begin_append(target_, session_, begin, [this](const Status& status) {
        begun_.store(status.ok(), std::memory_order_relaxed);
        settle(status);
      });
      return absl::OkStatus();
    }
    if (!request->has_chunk()) {
      return invalid_argument("chunk", "must follow: there is one header");
    }
    LONGSPAN_ASSIGN_OR_RETURN(const DecodedWrite write,
                              decode_write(request->chunk(), *target_, environment_.terms));
    add_pending();
    environment_.lead.write(target_,
                            session_,
                            write,
                            terms,
                            [this, request = std::move(request)](const Status& status) mutable {
                              request.reset();
                              settle(status);
                            });
    return absl::OkStatus();
  }

  void add_pending() {
    const std::lock_guard lock(mutex_);
    ++pending_;
  }

  // One pending thing has ended.
  void settle(const Status& status) {
    update([&] { end_pending(status); });
  }

  void end_pending(const Status& status) {  // under the lock
    --pending_;
    if (!status.ok() && !failure_) {
      failure_ = status;
    }
  }

  void settle_failure(const Status& status) {
    update([&] {
      if (!failure_) {
        failure_ = status;
      }
    });
  }

  // Changes the state under the lock, then does what the new state asks for. The object may be gone
  // afterwards.
  template <class Change>
  void update(const Change& change) {
    End next = End::kNone;
    {
      const std::lock_guard lock(mutex_);
      change();
      next = advance();
    }
    switch (next) {
      case End::kNone:
        return;
      case End::kProving:
        StartSendInitialMetadata();
        return;
      case End::kCommitting:
        commit();
        return;
      case End::kRollingBack:
        roll_back();
        return;
      case End::kFinished:
        finish();
        return;
    }
  }

  // What to start now, if anything; under the lock.
  End advance() {
    if (end_ != End::kNone) {
      return End::kNone;
    }
    if (!failure_ && !reads_ended_) {
      if (!reading_ && !handling_ && pending_ < kWindow) {
        reading_ = true;
        read_started_ = std::chrono::steady_clock::now();
        StartRead(&read_bytes_);
      }
      return End::kNone;
    }
    if (pending_ > 0) {
      return End::kNone;
    }
    if (!failure_ && target_ == nullptr) {
      failure_ = invalid_argument("header", "is missing");
    }
    if (failure_) {
      end_ = begun_.load(std::memory_order_relaxed) && !rolled_back_ ? End::kRollingBack
                                                                     : End::kFinished;
    } else if (committed_) {
      end_ = End::kFinished;
    } else {
      // A broken stream ends its reads just as a finished one does, and word of the break may come
      // later. Sending succeeds only on a stream that is still whole.
      end_ = proven_ ? End::kCommitting : End::kProving;
    }
    return end_;
  }

  void commit() {
    const CallTerms terms{.deadline = deadline_of(*context_, environment_.append_deadline),
                          .cancelled = &cancelled_};
    environment_.lead.commit(target_, session_, terms, [this](const StatusOr<ContextState>& state) {
      if (state.ok()) {
        write_response(*state);
      }
      update([&] {
        end_ = End::kNone;
        committed_ = state.ok();
        if (!state.ok()) {
          failure_ = state.status();
        }
      });
    });
  }

  void roll_back() {
    environment_.lead.roll_back(target_, session_, [this](const Status&) {
      update([&] {
        rolled_back_ = true;
        end_ = End::kNone;
      });
    });
  }

  void write_response(const ContextState& state) {
    v1::AppendResponse message;
    message.set_committed_length(static_cast<uint64_t>(state.committed_length()));
    for (const int64_t length : state.layer_lengths) {
      message.add_layer_lengths(static_cast<uint64_t>(length));
    }
    message.set_generation(state.generation);
    *response_ = serialize_message(message);
  }

  void finish() {
    record_.status = committed_ ? absl::OkStatus() : *failure_;
    add_retry_pushback(*context_, record_.status);
    Finish(to_grpc_status(record_.status));
  }

  const ServiceEnvironment& environment_;
  grpc::CallbackServerContext* context_;
  grpc::ByteBuffer* response_;
  std::chrono::steady_clock::time_point started_;
  RequestRecord record_;
  grpc::ByteBuffer read_bytes_;
  ContextRef target_;  // null before the header
  Lead::AppendSession session_ = 0;
  std::atomic<bool> cancelled_ = false;
  std::atomic<bool> begun_ = false;

  std::mutex mutex_;  // guards what follows
  int pending_ = 0;   // messages and lead's calls that have not ended
  std::optional<Status> failure_;
  std::chrono::steady_clock::time_point read_started_;
  bool reading_ = false;
  bool handling_ = false;  // a message: the next one is not read before it is queued
  bool reads_ended_ = false;
  bool proven_ = false;  // the stream was whole after its last message
  bool committed_ = false;
  bool rolled_back_ = false;
  End end_ = End::kNone;
};

}  // namespace

grpc::ServerReadReactor<grpc::ByteBuffer>* start_append_stream(
    const ServiceEnvironment& environment,
    grpc::CallbackServerContext* context,
    grpc::ByteBuffer* response) {
  return new AppendStream(environment, context, response);
}

}  // namespace longspan
