#include "client/cpp/retries.h"

#include <algorithm>
#include <random>
#include <thread>

#include "client/cpp/errors.h"

namespace longspan::client {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kFirstBackoff{20};
constexpr milliseconds kLastBackoff{1'000};

// Between one and one and a quarter of `delay`, so that clients that were refused together do not
// come back together.
milliseconds with_jitter(milliseconds delay) {
  thread_local std::minstd_rand generator(std::random_device{}());
  std::uniform_int_distribution<int64_t> extra(0, delay.count() / 4);
  return delay + milliseconds(extra(generator));
}

}  // namespace

Status Retries::call(const std::function<Status(grpc::ClientContext&)>& attempt) const {
  const auto start = std::chrono::steady_clock::now();
  const auto deadline = std::chrono::system_clock::now() + timeout;
  milliseconds backoff = kFirstBackoff;
  while (true) {
    grpc::ClientContext context;
    if (timeout > milliseconds::zero()) {
      context.set_deadline(deadline);
    }
    Status status = attempt(context);
    if (status.ok() || !is_retryable(status)) {
      return status;
    }
    const milliseconds delay = with_jitter(retry_delay(status).value_or(backoff));
    const auto end = std::chrono::steady_clock::now() - start + delay;
    if (end > retry_for || (timeout > milliseconds::zero() && end > timeout)) {
      return status;
    }
    std::this_thread::sleep_for(delay);
    backoff = std::min(2 * backoff, kLastBackoff);
  }
}

}  // namespace longspan::client
