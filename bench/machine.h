// What a benchmark measures itself against: the clock, the memory of this machine, and JSON lines.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace longspan::bench {

// Seconds of the median of as many runs as fit in `budget_seconds`, at least 3, after one more to
// warm up.
double median_seconds(double budget_seconds, const std::function<void()>& work);

// Bytes per second, read and written counted, of a copy that leaves every cache.
double copy_rate(int num_threads, size_t num_bytes);

std::string processor_name();

// One line of results: names and values in the order they were added.
class Record {
 public:
  Record& add(const std::string& name, const std::string& value);
  Record& add(const std::string& name, double value);
  std::string json() const;

 private:
  std::vector<std::pair<std::string, std::string>> fields_;  // values as JSON
};

}  // namespace longspan::bench
