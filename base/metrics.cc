#include "base/metrics.h"

#include <chrono>
#include <fstream>
#include <iterator>
#include <sys/resource.h>
#include <unistd.h>
#include <utility>

#include <dirent.h>

#include "base/error_details.h"

namespace longspan {
namespace {

// There are no tenants yet: everything is one tenant's.
constexpr char kTenant[] = "default";

prometheus::MetricFamily family_of(const char* name,
                                   const char* help,
                                   prometheus::MetricType type,
                                   double value) {
  prometheus::MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  prometheus::ClientMetric metric;
  if (type == prometheus::MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  family.metric.push_back(std::move(metric));
  return family;
}

double resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  double total = 0;
  double resident = 0;
  statm >> total >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

double open_descriptors() {
  double count = 0;
  if (DIR* directory = opendir("/proc/self/fd"); directory != nullptr) {
    while (readdir(directory) != nullptr) {  // NOLINT(concurrency-mt-unsafe)
      ++count;
    }
    closedir(directory);
    count -= 3;  // ".", "..", and the directory itself
  }
  return count;
}

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  constexpr double kMicrosecond = 1e-6;
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         kMicrosecond * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

// Why a request was turned away, where it was; empty otherwise.
const char* rejection(const Status& status) {
  if (status.code() == absl::StatusCode::kDeadlineExceeded) {
    return "deadline";
  }
  if (status.code() != absl::StatusCode::kResourceExhausted &&
      status.code() != absl::StatusCode::kUnavailable) {
    return "";
  }
  const std::string reason = reason_of(status);
  if (reason == "QUEUE_FULL") {
    return "queue";
  }
  if (reason == "QUOTA") {
    return "quota";
  }
  if (reason == "CAPACITY") {
    return "capacity";
  }
  return reason == "DRAINING" ? "draining" : "";
}

}  // namespace

prometheus::Histogram::BucketBoundaries latency_buckets() {
  return {25e-6,
          50e-6,
          100e-6,
          250e-6,
          500e-6,
          1e-3,
          2.5e-3,
          5e-3,
          10e-3,
          25e-3,
          50e-3,
          100e-3,
          250e-3,
          500e-3,
          1,
          2.5,
          5,
          10};
}

std::string code_name(absl::StatusCode code) { return absl::StatusCodeToString(code); }

RequestMetrics::RequestMetrics(prometheus::Registry& registry)
    : requests_(prometheus::BuildCounter()
                    .Name("longspan_requests_total")
                    .Help("Requests answered, by operation and code.")
                    .Register(registry)),
      durations_(prometheus::BuildHistogram()
                     .Name("longspan_request_duration_seconds")
                     .Help("Time from a request's arrival to its answer.")
                     .Register(registry)),
      inflight_(prometheus::BuildGauge()
                    .Name("longspan_inflight_requests")
                    .Help("Requests taken and not answered yet.")
                    .Register(registry)),
      rejected_(prometheus::BuildCounter()
                    .Name("longspan_rejected_total")
                    .Help("Requests turned away, by reason.")
                    .Register(registry)) {
  for (const char* reason : {"quota", "capacity", "queue", "deadline", "draining"}) {
    rejected_.Add({{"reason", reason}});
  }
}

RequestMetrics::Operation& RequestMetrics::operation(absl::string_view name) {
  const std::lock_guard lock(mutex_);
  const auto found = operations_.find(name);
  if (found != operations_.end()) {
    return found->second;
  }
  const std::string op(name);
  Operation& added = operations_[op];
  added.duration = &durations_.Add({{"op", op}}, latency_buckets());
  added.inflight = &inflight_.Add({{"op", op}});
  return added;
}

void RequestMetrics::started(absl::string_view name) { operation(name).inflight->Increment(); }

void RequestMetrics::finished(const RequestRecord& record) {
  Operation& op = operation(record.operation);
  op.inflight->Decrement();
  op.duration->Observe(std::chrono::duration<double>(record.duration).count());
  prometheus::Counter* counter = nullptr;
  {
    const std::lock_guard lock(mutex_);
    prometheus::Counter*& known = op.by_code[record.status.code()];
    if (known == nullptr) {
      known = &requests_.Add({{"op", std::string(record.operation)},
                              {"code", code_name(record.status.code())},
                              {"tenant", kTenant}});
    }
    counter = known;
  }
  counter->Increment();
  if (const std::string reason = rejection(record.status); !reason.empty()) {
    rejected_.Add({{"reason", reason}}).Increment();
  }
}

ProcessMetrics::ProcessMetrics(std::string version)
    : version_(std::move(version)),
      start_time_seconds_(
          std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch())
              .count()) {}

std::vector<prometheus::MetricFamily> ProcessMetrics::Collect() const {
  using prometheus::MetricType;
  std::vector<prometheus::MetricFamily> families;
  families.push_back(family_of(
      "process_cpu_seconds_total", "User and system time.", MetricType::Counter, cpu_seconds()));
  families.push_back(family_of(
      "process_resident_memory_bytes", "Resident memory.", MetricType::Gauge, resident_bytes()));
  families.push_back(
      family_of("process_open_fds", "Open descriptors.", MetricType::Gauge, open_descriptors()));
  families.push_back(family_of("process_start_time_seconds",
                               "Start of the process, Unix time.",
                               MetricType::Gauge,
                               start_time_seconds_));
  prometheus::MetricFamily build =
      family_of("longspan_build_info", "Version of the server.", MetricType::Gauge, 1);
  build.metric.front().label.push_back({"version", version_});
  families.push_back(std::move(build));
  return families;
}

}  // namespace longspan
