#include "bench/machine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

namespace longspan::bench {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

double median_seconds(double budget_seconds, const std::function<void()>& work) {
  work();
  std::vector<double> seconds;
  const double start = now();
  while (seconds.size() < 3 || (now() - start < budget_seconds && seconds.size() < 1000)) {
    const double before = now();
    work();
    seconds.push_back(now() - before);
  }
  const auto middle = seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

double copy_rate(int num_threads, size_t num_bytes) {
  std::vector<char> from(num_bytes, 1);
  std::vector<char> to(num_bytes, 2);
  const size_t part = num_bytes / static_cast<size_t>(num_threads);
  const double seconds = median_seconds(0.5, [&] {
    std::vector<std::thread> threads;
    for (int thread = 0; thread < num_threads; ++thread) {
      const size_t begin = part * static_cast<size_t>(thread);
      threads.emplace_back(
          [&, begin] { std::memcpy(to.data() + begin, from.data() + begin, part); });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  });
  return 2.0 * static_cast<double>(part) * num_threads / seconds;
}

std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) {
      return line.substr(line.find(':') + 2);
    }
  }
  return "unknown";
}

Record& Record::add(const std::string& name, const std::string& value) {
  std::string quoted = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
    }
    quoted += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  fields_.emplace_back(name, quoted + "\"");
  return *this;
}

Record& Record::add(const std::string& name, double value) {
  std::ostringstream text;
  text.precision(6);
  text << value;
  fields_.emplace_back(name, std::isfinite(value) ? text.str() : "null");
  return *this;
}

std::string Record::json() const {
  std::string text = "{";
  for (const auto& [name, value] : fields_) {
    text.append(text.size() > 1 ? ", \"" : "\"").append(name).append("\": ").append(value);
  }
  return text + "}";
}

}  // namespace longspan::bench
