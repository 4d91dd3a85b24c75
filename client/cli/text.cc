#include "client/cli/text.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <unistd.h>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longspan::cli {
namespace {

constexpr std::chrono::milliseconds kRedrawInterval{100};
constexpr std::chrono::milliseconds kLineInterval{2'000};
constexpr size_t kBarWidth = 30;

bool looks_like_number(const std::string& text) {
  return !text.empty() && std::isdigit(static_cast<unsigned char>(text[0])) != 0 &&
         text.find_first_of(":T") == std::string::npos;
}

std::string format_duration(double seconds) {
  std::array<char, 32> buffer{};
  const long whole = std::lround(seconds);
  std::snprintf(buffer.data(), buffer.size(), "%ld:%02ld", whole / 60, whole % 60);
  return buffer.data();
}

}  // namespace

Table::Table(std::vector<std::string> headings) { rows_.push_back(std::move(headings)); }

void Table::add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }

void Table::print() const {
  const size_t columns = rows_[0].size();
  std::vector<size_t> widths(columns, 0);
  // A column of numbers is right-aligned as a whole, its heading too.
  std::vector<bool> numeric(columns, rows_.size() > 1);
  for (size_t index = 0; index < rows_.size(); ++index) {
    for (size_t column = 0; column < columns; ++column) {
      widths[column] = std::max(widths[column], rows_[index][column].size());
      if (index > 0 && !looks_like_number(rows_[index][column])) {
        numeric[column] = false;
      }
    }
  }
  for (const auto& row : rows_) {
    std::string line;
    for (size_t column = 0; column < columns; ++column) {
      const std::string padding(widths[column] - row[column].size(), ' ');
      absl::StrAppend(
          &line, numeric[column] ? padding : "", row[column], numeric[column] ? "" : padding, "  ");
    }
    line.erase(line.find_last_not_of(' ') + 1);
    std::printf("%s\n", line.c_str());
  }
}

void print_json(const nlohmann::ordered_json& value) {
  std::printf("%s\n",
              value.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace).c_str());
}

std::string format_bytes(double bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < kUnits.size()) {
    bytes /= 1024;
    ++unit;
  }
  return absl::StrCat(format_fixed(bytes, unit == 0 ? 0 : 1), " ", kUnits[unit]);
}

std::string format_count(uint64_t count) {
  const std::string digits = std::to_string(count);
  std::string text;
  for (size_t place = 0; place < digits.size(); ++place) {
    if (place > 0 && (digits.size() - place) % 3 == 0) {
      text += ',';
    }
    text += digits[place];
  }
  return text;
}

std::string format_fixed(double value, int digits) {
  std::array<char, 64> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%.*f", digits, value);
  return buffer.data();
}

Progress::Progress(std::string title, uint64_t total, std::string unit, bool quiet)
    : title_(std::move(title)),
      total_(std::max<uint64_t>(1, total)),
      unit_(std::move(unit)),
      quiet_(quiet),
      terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() { show(true); }

void Progress::update(uint64_t done) {
  done_ = done;
  const auto now = std::chrono::steady_clock::now();
  const uint64_t tenths = 10 * done / total_;
  const bool due = now - shown_at_ >= (terminal_ ? kRedrawInterval : kLineInterval);
  if (due && (terminal_ || tenths > shown_tenths_)) {
    shown_at_ = now;
    shown_tenths_ = tenths;
    show(false);
  }
}

double Progress::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Progress::show(bool last) {
  if (quiet_) {
    return;
  }
  const double elapsed = seconds();
  const double rate = elapsed > 0 ? static_cast<double>(done_) / elapsed : 0;
  std::string bar;
  if (terminal_) {
    const auto filled = static_cast<size_t>(kBarWidth * done_ / total_);
    bar = absl::StrCat("[", std::string(filled, '#'), std::string(kBarWidth - filled, '.'), "]  ");
  }
  const std::string time = last ? absl::StrCat("took ", format_duration(elapsed))
                                : absl::StrCat(format_duration(static_cast<double>(total_ - done_) /
                                                               std::max(rate, 1e-9)),
                                               " left");
  const std::string line = absl::StrCat(title_,
                                        "  ",
                                        bar,
                                        format_count(done_),
                                        " / ",
                                        format_count(total_),
                                        " ",
                                        unit_,
                                        "  ",
                                        format_count(static_cast<uint64_t>(rate)),
                                        "/s  ",
                                        time);
  std::fprintf(
      stderr, "%s%s%s", terminal_ ? "\r\033[K" : "", line.c_str(), terminal_ && !last ? "" : "\n");
}

}  // namespace longspan::cli
