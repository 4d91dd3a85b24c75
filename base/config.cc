#include "base/config.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"

#include "base/checked.h"

namespace longspan {
namespace {

struct Suffix {
  absl::string_view text;
  int64_t factor;
};
// The largest first: the order in which a value is printed.
constexpr Suffix kByteSuffixes[] = {{"TiB", int64_t{1} << 40},
                                    {"GiB", int64_t{1} << 30},
                                    {"MiB", int64_t{1} << 20},
                                    {"KiB", int64_t{1} << 10},
                                    {"B", 1}};
constexpr Suffix kDurationSuffixes[] = {{"h", 3'600'000}, {"min", 60'000}, {"ms", 1}, {"s", 1'000}};

// An integer, optionally followed by one of the suffixes.
template <size_t N>
std::optional<int64_t> parse_scaled(absl::string_view text, const Suffix (&suffixes)[N]) {
  int64_t factor = 1;
  for (const Suffix& suffix : suffixes) {
    if (absl::ConsumeSuffix(&text, suffix.text)) {
      factor = suffix.factor;
      break;
    }
  }
  int64_t value = 0;
  if (!absl::SimpleAtoi(text, &value)) {
    return std::nullopt;
  }
  return value < 0 ? std::optional<int64_t>(value) : checked_product(value, factor);
}

template <size_t N>
std::string print_scaled(int64_t value, const Suffix (&suffixes)[N]) {
  for (const Suffix& suffix : suffixes) {
    if (value != 0 && value % suffix.factor == 0) {
      return absl::StrCat(value / suffix.factor, suffix.text);
    }
  }
  return absl::StrCat(value);
}

template <class... Visitors>
struct Overloaded : Visitors... {
  using Visitors::operator()...;
};
template <class... Visitors>
Overloaded(Visitors...) -> Overloaded<Visitors...>;

Status wrong(absl::string_view text, absl::string_view expected) {
  return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not ", expected));
}

Status check_bounds(const Option& option, int64_t value, absl::string_view text) {
  if (value < option.min || value > option.max) {
    return absl::InvalidArgumentError(
        option.max == std::numeric_limits<int64_t>::max()
            ? absl::StrCat("\"", text, "\" is below ", option.min)
            : absl::StrCat("\"", text, "\" is not within ", option.min, " to ", option.max));
  }
  return absl::OkStatus();
}

Status set_integer(const Option& option, int64_t& target, absl::string_view text) {
  std::optional<int64_t> value;
  if (option.unit == Option::Unit::kBytes) {
    value = parse_scaled(text, kByteSuffixes);
  } else if (int64_t plain = 0; absl::SimpleAtoi(text, &plain)) {
    value = plain;
  }
  if (!value) {
    return wrong(text, option.unit == Option::Unit::kBytes ? "a size such as 64MiB" : "an integer");
  }
  LONGSPAN_RETURN_IF_ERROR(check_bounds(option, *value, text));
  target = *value;
  return absl::OkStatus();
}

Status set_text(const Option& option, std::string& target, absl::string_view text) {
  if (!option.choices.empty() &&
      std::find(option.choices.begin(), option.choices.end(), std::string(text)) ==
          option.choices.end()) {
    return wrong(text, absl::StrCat("one of ", absl::StrJoin(option.choices, ", ")));
  }
  target = std::string(text);
  return absl::OkStatus();
}

Status set_duration(const Option& option,
                    std::chrono::milliseconds& target,
                    absl::string_view text) {
  const std::optional<int64_t> value = parse_scaled(text, kDurationSuffixes);
  if (!value) {
    return wrong(text, "a duration such as 500ms, 2s or 5min");
  }
  LONGSPAN_RETURN_IF_ERROR(check_bounds(option, *value, text));
  target = std::chrono::milliseconds(*value);
  return absl::OkStatus();
}

const Option* find_option(const Options& options, absl::string_view name) {
  const auto found = std::find_if(
      options.begin(), options.end(), [name](const Option& option) { return option.name == name; });
  return found == options.end() ? nullptr : &*found;
}

std::string quote_if_needed(const std::string& text) {
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isgraph(static_cast<unsigned char>(c)) && c != '#' && c != '"';
  });
  return plain ? text : absl::StrCat("\"", text, "\"");
}

// The value of a line without its comment and quotes.
StatusOr<std::string> unquote(absl::string_view text) {
  if (absl::ConsumePrefix(&text, "\"")) {
    const size_t end = text.find('"');
    if (end == absl::string_view::npos) {
      return absl::InvalidArgumentError("the closing quote is missing");
    }
    const absl::string_view rest = absl::StripAsciiWhitespace(text.substr(end + 1));
    if (!rest.empty() && rest.front() != '#') {
      return absl::InvalidArgumentError(absl::StrCat("unexpected \"", rest, "\" after the value"));
    }
    return std::string(text.substr(0, end));
  }
  return std::string(absl::StripAsciiWhitespace(text.substr(0, text.find('#'))));
}

class FileReader {
 public:
  FileReader(const Options& options, std::string path, std::vector<ConfigError>& errors)
      : options_(options), path_(std::move(path)), errors_(errors) {}

  void read() {
    std::ifstream file(path_);
    if (!file) {
      errors_.push_back({path_, "cannot be read"});
      return;
    }
    int number = 0;
    for (std::string line; std::getline(file, line);) {
      if (const Status status = read_line(absl::StripAsciiWhitespace(line)); !status.ok()) {
        errors_.push_back({absl::StrCat(path_, ":", number + 1), std::string(status.message())});
      }
      ++number;
    }
  }

 private:
  Status read_line(absl::string_view line) {
    if (line.empty() || line.front() == '#') {
      return absl::OkStatus();
    }
    const size_t equals = line.find('=');
    if (equals == absl::string_view::npos) {
      return absl::InvalidArgumentError(absl::StrCat("\"", line, "\" is not name = value"));
    }
    const std::string name(absl::StripAsciiWhitespace(line.substr(0, equals)));
    const Option* option = find_option(options_, name);
    if (option == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("there is no option \"", name, "\""));
    }
    if (!seen_.insert(name).second) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is set twice"));
    }
    LONGSPAN_ASSIGN_OR_RETURN(const std::string value,
                              unquote(absl::StripLeadingAsciiWhitespace(line.substr(equals + 1))));
    if (const Status status = option->set(value); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": ", status.message()));
    }
    return absl::OkStatus();
  }

  const Options& options_;
  std::string path_;
  std::vector<ConfigError>& errors_;
  std::set<std::string> seen_;
};

}  // namespace

std::string Option::flag() const {
  return absl::StrCat("--", absl::StrReplaceAll(name, {{"_", "-"}}));
}

std::string Option::environment() const {
  return absl::StrCat("LONGSPAN_", absl::AsciiStrToUpper(name));
}

std::string Option::type() const {
  return std::visit(
      Overloaded{[](bool*) { return "boolean"; },
                 [this](int64_t*) { return unit == Unit::kBytes ? "bytes" : "integer"; },
                 [](std::string*) { return "text"; },
                 [](std::chrono::milliseconds*) { return "duration"; }},
      target);
}

std::string Option::value() const {
  return std::visit(Overloaded{[](const bool* set) { return std::string(*set ? "true" : "false"); },
                               [this](const int64_t* set) {
                                 return unit == Unit::kBytes ? print_scaled(*set, kByteSuffixes)
                                                             : absl::StrCat(*set);
                               },
                               [](const std::string* set) { return quote_if_needed(*set); },
                               [](const std::chrono::milliseconds* set) {
                                 const int64_t count = set->count();
                                 return count % 1000 == 0 ? absl::StrCat(count / 1000, "s")
                                                          : absl::StrCat(count, "ms");
                               }},
                    target);
}

Status Option::set(absl::string_view text) const {
  return std::visit(
      Overloaded{
          [text](bool* set) {
            return absl::SimpleAtob(text, set) ? absl::OkStatus() : wrong(text, "true or false");
          },
          [this, text](int64_t* set) { return set_integer(*this, *set, text); },
          [this, text](std::string* set) { return set_text(*this, *set, text); },
          [this, text](std::chrono::milliseconds* set) { return set_duration(*this, *set, text); }},
      target);
}

std::vector<ConfigError> load_config(const Options& options, const ConfigSources& sources) {
  std::vector<ConfigError> errors;
  const auto apply = [&errors](
                         const Option& option, const std::string& where, const std::string& text) {
    if (const Status status = option.set(text); !status.ok()) {
      errors.push_back({where, std::string(status.message())});
    }
  };
  if (!sources.file.empty()) {
    FileReader(options, sources.file, errors).read();
  }
  for (const Option& option : options) {
    const auto found = sources.environment.find(option.environment());
    if (found != sources.environment.end()) {
      apply(option, found->first, found->second);
    }
  }
  for (const auto& [name, text] : sources.flags) {
    if (const Option* option = find_option(options, name); option != nullptr) {
      apply(*option, option->flag(), text);
    } else {
      errors.push_back({name, "there is no such option"});
    }
  }
  return errors;
}

std::map<std::string, std::string> environment_of_process(const Options& options) {
  std::map<std::string, std::string> found;
  for (const Option& option : options) {
    const std::string variable = option.environment();
    if (const char* text = std::getenv(variable.c_str()); text != nullptr) {
      found.emplace(variable, text);
    }
  }
  return found;
}

std::string print_config(const Options& options) {
  std::string text;
  for (const Option& option : options) {
    absl::StrAppend(&text, "# ", option.help, " (", option.type());
    if (!option.choices.empty()) {
      absl::StrAppend(&text, ": ", absl::StrJoin(option.choices, ", "));
    }
    absl::StrAppend(&text, ")\n", option.name, " = ", option.value(), "\n");
  }
  return text;
}

}  // namespace longspan
