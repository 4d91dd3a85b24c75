// A bidirectional stream that takes at most `window` messages before it has answered them, and
// answers in order: a peer that does not read is not read from.
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "grpcpp/grpcpp.h"

#include "base/request.h"
#include "base/rpc.h"
#include "base/status.h"
#include "base/stream_set.h"

namespace longspan {

// Derive, implement `handle`, and call `start` once the object is whole. Deletes itself.
template <class Request, class Response>
class OrderedStream : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                      private StreamSet::Member {
 protected:
  struct Slot {
    Request request;
    Response response;
    bool has_response = true;
    bool done = false;
    std::chrono::steady_clock::time_point arrival;
  };

  OrderedStream(grpc::CallbackServerContext* context,
                RequestObserver& observer,
                StreamSet& streams,
                absl::string_view operation,
                std::chrono::milliseconds stall_timeout)
      : context_(context),
        observer_(observer),
        streams_(streams),
        stall_timeout_(stall_timeout),
        started_(std::chrono::steady_clock::now()) {
    record_.operation = operation;
    observer_.started(operation);
  }

  // One message, on a gRPC thread; the next one is not read before this returns. With OK it leads
  // to exactly one `complete(slot)`, from any thread. An error ends the stream, once everything
  // taken before has been answered.
  virtual Status handle(Slot& slot) = 0;

  void start() {
    streams_.add(this);
    const std::lock_guard lock(mutex_);
    read_next();
  }

  // How many messages may be unanswered; from `handle` only.
  void set_window(size_t window) { window_ = window; }
  void set_context_id(const std::string& context_id) { record_.context_id = context_id; }
  const std::atomic<bool>& cancelled() const { return cancelled_; }
  grpc::CallbackServerContext& context() { return *context_; }
  RequestObserver& observer() { return observer_; }

  void complete(Slot& slot) {
    const std::lock_guard lock(mutex_);
    slot.done = true;
    advance();
  }

 private:
  void OnReadDone(bool ok) override {
    Slot* slot = nullptr;
    {
      const std::lock_guard lock(mutex_);
      reading_ = false;
      if (!ok || ended()) {
        ended_by_peer_ = ended_by_peer_ || !ok;
        advance();
        return;
      }
      slots_.push_back(std::make_unique<Slot>());
      slot = slots_.back().get();
      slot->arrival = std::chrono::steady_clock::now();
      handling_ = true;
    }
    Status status = parse_message(read_bytes_, slot->request);
    read_bytes_.Clear();
    if (status.ok()) {
      status = handle(*slot);
    }
    const std::lock_guard lock(mutex_);
    handling_ = false;
    if (!status.ok()) {
      slot->has_response = false;
      slot->done = true;
      if (!failure_) {
        failure_ = std::move(status);
      }
    }
    advance();
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    slots_.pop_front();
    if (!ok) {
      cancelled_.store(true, std::memory_order_relaxed);
    }
    advance();
  }

  void OnCancel() override {
    const std::lock_guard lock(mutex_);
    cancelled_.store(true, std::memory_order_relaxed);
    advance();
  }

  void OnDone() override {
    streams_.remove(this);
    // Whoever called Finish may still hold the lock.
    { const std::lock_guard lock(mutex_); }
    record_.identity = identity_of(*context_);
    record_.duration = std::chrono::steady_clock::now() - started_;
    observer_.finished(record_);
    delete this;
  }

  void drain() override {
    const std::lock_guard lock(mutex_);
    if (!failure_) {
      failure_ = draining_error();
    }
    advance();
  }

  void end_if_stalled(std::chrono::steady_clock::time_point now) override {
    const std::lock_guard lock(mutex_);
    if (writing_ && now - write_started_ > stall_timeout_) {
      if (!failure_) {
        failure_ = absl::DeadlineExceededError("an answer was left unread for too long");
      }
      context_->TryCancel();
    }
  }

  bool ended() const {
    return failure_.has_value() || ended_by_peer_ || cancelled_.load(std::memory_order_relaxed);
  }

  void read_next() {
    reading_ = true;
    StartRead(&read_bytes_);
  }

  // Does what the state allows: writes the next answer, reads the next message, or finishes. Under
  // the lock.
  void advance() {
    while (!writing_ && !slots_.empty() && slots_.front()->done &&
           (!slots_.front()->has_response || cancelled_.load(std::memory_order_relaxed))) {
      slots_.pop_front();
    }
    if (!writing_ && !slots_.empty() && slots_.front()->done) {
      writing_ = true;
      write_started_ = std::chrono::steady_clock::now();
      write_bytes_ = serialize_message(slots_.front()->response);
      StartWrite(&write_bytes_);
    }
    if (ended()) {
      if (slots_.empty() && !writing_ && !handling_ && !finished_) {
        finished_ = true;
        record_.status = failure_.value_or(cancelled_.load(std::memory_order_relaxed)
                                               ? absl::CancelledError("the stream broke")
                                               : absl::OkStatus());
        add_retry_pushback(*context_, record_.status);
        Finish(to_grpc_status(record_.status));
      }
    } else if (!reading_ && !handling_ && slots_.size() < window_) {
      read_next();
    }
  }

  grpc::CallbackServerContext* context_;
  RequestObserver& observer_;
  StreamSet& streams_;
  std::chrono::milliseconds stall_timeout_;
  std::chrono::steady_clock::time_point started_;
  RequestRecord record_;
  grpc::ByteBuffer read_bytes_;
  grpc::ByteBuffer write_bytes_;
  std::atomic<bool> cancelled_ = false;

  std::mutex mutex_;  // guards what follows
  std::deque<std::unique_ptr<Slot>> slots_;
  size_t window_ = 1;
  std::optional<Status> failure_;
  std::chrono::steady_clock::time_point write_started_;
  bool reading_ = false;
  bool handling_ = false;
  bool writing_ = false;
  bool ended_by_peer_ = false;
  bool finished_ = false;
};

}  // namespace longspan
