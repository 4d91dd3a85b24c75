#include "coordinator/catalogue.h"

#include <algorithm>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/util/message_differencer.h"

#include "base/error_details.h"

namespace longspan {
namespace {

constexpr size_t kMaxIdLength = 128;
constexpr std::chrono::milliseconds kBusyRetry{50};
constexpr std::chrono::milliseconds kFullRetry{1000};

bool is_valid_id(const std::string& id) {
  return !id.empty() && id.size() <= kMaxIdLength && std::all_of(id.begin(), id.end(), [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  });
}

Status unknown(const std::string& id) {
  return with_reason(absl::NotFoundError(absl::StrCat("there is no context \"", id, "\"")),
                     "CONTEXT_NOT_FOUND",
                     {{"context_id", id}});
}

Status busy(const std::string& id) {
  return with_retry(with_reason(absl::UnavailableError(absl::StrCat(
                                    "the context \"", id, "\" is being created or removed")),
                                "CONTEXT_BUSY"),
                    kBusyRetry);
}

}  // namespace

std::optional<std::chrono::nanoseconds> ContextRecord::ttl() const {
  if (!asked.has_ttl()) {
    return std::nullopt;
  }
  return std::chrono::seconds(asked.ttl().seconds()) +
         std::chrono::nanoseconds(asked.ttl().nanos());
}

StatusOr<Catalogue::Reservation> Catalogue::reserve(ContextRecord& record, Moment now) {
  if (!record.context_id.empty() && !is_valid_id(record.context_id)) {
    return invalid_argument(
        record.parent_id.empty() ? "context_id" : "new_context_id",
        absl::StrCat("must be 1 to ", kMaxIdLength, " characters of A-Z a-z 0-9 . _ -"));
  }
  if (record.request_id.size() > kMaxIdLength) {
    return invalid_argument("request_id",
                            absl::StrCat("must have at most ", kMaxIdLength, " bytes"));
  }
  if (const auto known = by_request_.find(record.request_id); known != by_request_.end()) {
    if (record.context_id.empty() || record.context_id == known->second) {
      return answer_again(records_.at(known->second), record);
    }
  }
  if (const auto existing = records_.find(record.context_id); existing != records_.end()) {
    return answer_again(existing->second, record);
  }
  if (records_.size() >= max_contexts_) {
    return with_retry(with_reason(absl::ResourceExhaustedError(absl::StrCat(
                                      "there are ", max_contexts_, " contexts already")),
                                  "CAPACITY"),
                      kFullRetry);
  }
  if (record.context_id.empty()) {
    record.context_id = fresh_id();
  }
  record.created = now.system;
  record.renewed = now.steady;
  record.state = RecordState::kPending;
  if (!record.request_id.empty()) {
    by_request_[record.request_id] = record.context_id;
  }
  records_[record.context_id] = record;
  return Reservation::kReserved;
}

StatusOr<Catalogue::Reservation> Catalogue::answer_again(const ContextRecord& existing,
                                                         ContextRecord& asked) const {
  if (existing.state != RecordState::kReady) {
    return busy(existing.context_id);
  }
  using google::protobuf::util::MessageDifferencer;
  const bool same_spec = MessageDifferencer::Equals(existing.asked, asked.asked) ||
                         MessageDifferencer::Equals(existing.spec, asked.asked);
  if (existing.parent_id != asked.parent_id || existing.forked_tokens != asked.forked_tokens ||
      !same_spec) {
    return with_reason(
        absl::AlreadyExistsError(absl::StrCat(
            "there is a context \"", existing.context_id, "\" that was made in another way")),
        "CONTEXT_EXISTS",
        {{"context_id", existing.context_id}});
  }
  asked.context_id = existing.context_id;
  return Reservation::kExists;
}

std::string Catalogue::fresh_id() const {
  absl::BitGen random;
  std::string id;
  do {
    id = absl::StrCat("ctx-", absl::Hex(absl::Uniform<uint64_t>(random), absl::kZeroPad16));
  } while (records_.contains(id));
  return id;
}

void Catalogue::confirm(const std::string& context_id, const v1::ContextSpec& spec) {
  ContextRecord& record = records_.at(context_id);
  record.spec = spec;
  record.state = RecordState::kReady;
}

void Catalogue::cancel_removal(const std::string& context_id) {
  records_.at(context_id).state = RecordState::kReady;
}

void Catalogue::drop(const std::string& context_id) {
  const auto found = records_.find(context_id);
  if (found == records_.end()) {
    return;
  }
  const auto request = by_request_.find(found->second.request_id);
  if (request != by_request_.end() && request->second == context_id) {
    by_request_.erase(request);
  }
  records_.erase(found);
}

Status Catalogue::begin_removal(const std::string& context_id) {
  const auto found = records_.find(context_id);
  if (found == records_.end()) {
    return unknown(context_id);
  }
  if (found->second.state != RecordState::kReady) {
    return busy(context_id);
  }
  found->second.state = RecordState::kPending;
  return absl::OkStatus();
}

StatusOr<const ContextRecord*> Catalogue::find(const std::string& context_id) const {
  const auto found = records_.find(context_id);
  if (found == records_.end() || found->second.state != RecordState::kReady) {
    return unknown(context_id);
  }
  return &found->second;
}

std::vector<const ContextRecord*> Catalogue::list(const std::string& after_id,
                                                  size_t max_records) const {
  std::vector<const ContextRecord*> listed;
  for (auto record = records_.upper_bound(after_id);
       record != records_.end() && listed.size() < max_records;
       ++record) {
    if (record->second.state == RecordState::kReady) {
      listed.push_back(&record->second);
    }
  }
  return listed;
}

Status Catalogue::renew(const std::string& context_id, SteadyTime now) {
  const auto found = records_.find(context_id);
  if (found == records_.end() || found->second.state != RecordState::kReady) {
    return unknown(context_id);
  }
  found->second.renewed = now;
  return absl::OkStatus();
}

std::vector<std::string> Catalogue::overdue(SteadyTime now) const {
  std::vector<std::string> ids;
  for (const auto& [id, record] : records_) {
    const auto ttl = record.ttl();
    if (record.state == RecordState::kReady && ttl && now - record.renewed >= *ttl) {
      ids.push_back(id);
    }
  }
  return ids;
}

size_t Catalogue::num_ready() const {
  return static_cast<size_t>(
      std::count_if(records_.begin(), records_.end(), [](const auto& record) {
        return record.second.state == RecordState::kReady;
      }));
}

}  // namespace longspan
