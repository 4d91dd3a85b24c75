// What the coordinator remembers of contexts: specs, leases, who asked for them. In memory.
//
// A plain state machine: time is an argument, nothing is called from here. Thread-compatible; its
// owner locks.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "longspan/v1/context.pb.h"

#include "base/status.h"

namespace longspan {

using SteadyTime = std::chrono::steady_clock::time_point;
using SystemTime = std::chrono::system_clock::time_point;

// Both clocks at one moment: leases run on the steady one, people read the other.
struct Moment {
  SteadyTime steady;
  SystemTime system;
};

// kPending: the worker is about to create or to remove it.
enum class RecordState : uint8_t { kPending, kReady };

struct ContextRecord {
  std::string context_id;
  v1::ContextSpec asked;  // as the caller gave it
  v1::ContextSpec spec;   // as the worker took it
  RecordState state = RecordState::kPending;
  SystemTime created;
  SteadyTime renewed;
  std::string request_id;  // of its creation
  // Of a fork; empty: none.
  std::string parent_id;
  uint64_t forked_tokens = 0;

  std::optional<std::chrono::nanoseconds> ttl() const;
};

class Catalogue {
 public:
  explicit Catalogue(size_t max_contexts) : max_contexts_(max_contexts) {}

  // The outcome of asking for a new context: one that exists already is answered as it is.
  enum class Reservation : uint8_t { kReserved, kExists };

  // Reserves `record.context_id`, or a fresh id when it is empty, and writes the id back. kExists
  // when a ready context was asked for in the same way before (equal spec and parent, or the same
  // request_id). ALREADY_EXISTS, UNAVAILABLE while it is pending, RESOURCE_EXHAUSTED when full.
  StatusOr<Reservation> reserve(ContextRecord& record, Moment now);
  // The worker has it and took it so; or has not.
  void confirm(const std::string& context_id, const v1::ContextSpec& spec);
  void drop(const std::string& context_id);
  // Nobody but its remover sees it any more. NOT_FOUND; UNAVAILABLE while it is pending.
  Status begin_removal(const std::string& context_id);
  void cancel_removal(const std::string& context_id);

  // Ready ones only. NOT_FOUND.
  StatusOr<const ContextRecord*> find(const std::string& context_id) const;
  // Up to `max_records` ready ones after `after_id`, by id.
  std::vector<const ContextRecord*> list(const std::string& after_id, size_t max_records) const;

  // NOT_FOUND.
  Status renew(const std::string& context_id, SteadyTime now);
  // Ready contexts whose lease has run out unless they were used meanwhile.
  std::vector<std::string> overdue(SteadyTime now) const;

  size_t num_contexts() const { return records_.size(); }
  size_t num_ready() const;

 private:
  std::string fresh_id() const;
  StatusOr<Reservation> answer_again(const ContextRecord& existing, ContextRecord& asked) const;

  size_t max_contexts_;
  std::map<std::string, ContextRecord> records_;
  std::map<std::string, std::string> by_request_;  // request_id -> context_id
};

}  // namespace longspan
