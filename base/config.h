// Typed configuration from a file, the environment and flags: flags > environment > file >
// defaults.
//
// One table of options drives all of them, `--help`, `config check` and `config print`. A file has
// lines `name = value`; `#` starts a comment, and text may stand in double quotes.
#pragma once

#include <chrono>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"

#include "base/status.h"

namespace longspan {

// One option, bound to the variable that it sets. The variable's value beforehand is the default.
struct Option {
  enum class Unit : uint8_t { kNone, kBytes };
  using Target = std::variant<bool*, int64_t*, std::string*, std::chrono::milliseconds*>;

  std::string name;  // snake_case
  Target target;
  std::string help;
  // Bounds of integers; of durations in milliseconds.
  int64_t min = 0;
  int64_t max = std::numeric_limits<int64_t>::max();
  Unit unit = Unit::kNone;
  std::vector<std::string> choices = {};  // of text; empty: any

  std::string flag() const;         // --name-with-dashes
  std::string environment() const;  // LONGSPAN_NAME
  std::string type() const;         // "integer", "bytes", "duration", "boolean", "text"
  std::string value() const;        // as a file would spell it
  // INVALID_ARGUMENT says what is wrong with the text; the variable is then unchanged.
  Status set(absl::string_view text) const;
};

using Options = std::vector<Option>;

struct ConfigError {
  std::string where;  // "serve.conf:3", "LONGSPAN_PORT", "--port"
  std::string message;
};

struct ConfigSources {
  std::string file = {};                                        // empty: none
  std::map<std::string, std::string> environment = {};          // by variable name
  std::vector<std::pair<std::string, std::string>> flags = {};  // by option name, in order
};

// Sets the variables; answers every error of every source at once.
std::vector<ConfigError> load_config(const Options& options, const ConfigSources& sources);

// The variables of this process that name an option.
std::map<std::string, std::string> environment_of_process(const Options& options);

// A file that load_config reads back to the same values, with the help as comments.
std::string print_config(const Options& options);

}  // namespace longspan
