// The process's log: text or JSON lines on standard error, written by a thread of its own.
#pragma once

#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "spdlog/async.h"
#include "spdlog/logger.h"

#include "base/request.h"
#include "base/status.h"

namespace longspan {

enum class LogFormat : uint8_t { kText, kJson };

// Thread-safe. A full queue drops the oldest lines rather than hold up a request.
class Log {
 public:
  // `level`: trace, debug, info, warning, error or off.
  Log(const std::string& level, LogFormat format);

  // Something that happened to the process.
  void event(spdlog::level::level_enum level, absl::string_view message);
  // One line a request; steps and chunks of a stream only when they fail, or at level debug.
  void request(const RequestRecord& record);

 private:
  LogFormat format_;
  std::shared_ptr<spdlog::details::thread_pool> writer_;  // writes what is queued when it ends
  std::shared_ptr<spdlog::logger> logger_;
};

}  // namespace longspan
