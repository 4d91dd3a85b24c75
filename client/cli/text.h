// Text for people: aligned tables, sizes, numbers with separators, and progress on long work.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace longspan::cli {

// Columns padded to their widest cell; numbers stand right-aligned.
class Table {
 public:
  explicit Table(std::vector<std::string> headings);
  void add(std::vector<std::string> row);
  void print() const;

 private:
  std::vector<std::vector<std::string>> rows_;  // the headings first
};

// On standard output, with text that is not UTF-8 replaced.
void print_json(const nlohmann::ordered_json& value);

std::string format_bytes(double bytes);    // "2.4 GiB"
std::string format_count(uint64_t count);  // "1,048,576"
std::string format_fixed(double value, int digits);

// A bar on a terminal; elsewhere a line now and then, at most ten, and one at the end. On standard
// error.
class Progress {
 public:
  // Units appear as `done / total unit`.
  Progress(std::string title, uint64_t total, std::string unit, bool quiet);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();

  void update(uint64_t done);
  double seconds() const;

 private:
  void show(bool last);

  std::string title_;
  uint64_t total_;
  std::string unit_;
  bool quiet_;
  bool terminal_;
  uint64_t done_ = 0;
  uint64_t shown_tenths_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point shown_at_ = start_;
};

}  // namespace longspan::cli
