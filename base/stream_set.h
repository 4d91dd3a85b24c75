// The streams that a service has open, to end them: all of them on shutdown, single ones whose peer
// does not read or write any more.
#pragma once

#include <chrono>
#include <mutex>
#include <unordered_set>

namespace longspan {

class StreamSet {
 public:
  class Member {
   public:
    Member() = default;
    Member(const Member&) = delete;
    Member& operator=(const Member&) = delete;
    virtual ~Member() = default;
    // Take nothing more, answer what was taken, then end with UNAVAILABLE.
    virtual void drain() = 0;
    virtual void end_if_stalled(std::chrono::steady_clock::time_point now) = 0;
  };

  void add(Member* member) {
    const std::lock_guard lock(mutex_);
    members_.insert(member);
    if (draining_) {
      member->drain();
    }
  }
  void remove(Member* member) {
    const std::lock_guard lock(mutex_);
    members_.erase(member);
  }
  void drain() {
    const std::lock_guard lock(mutex_);
    draining_ = true;
    for (Member* member : members_) {
      member->drain();
    }
  }
  void end_stalled(std::chrono::steady_clock::time_point now) {
    const std::lock_guard lock(mutex_);
    for (Member* member : members_) {
      member->end_if_stalled(now);
    }
  }

 private:
  std::mutex mutex_;  // held while a member is called: members never call back under their own lock
  std::unordered_set<Member*> members_;
  bool draining_ = false;
};

}  // namespace longspan
