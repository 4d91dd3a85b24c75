// What every command of `longspan` shares: the global options, how it is run, and what the shell
// can complete.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <CLI/App.hpp>
#include <CLI/Validators.hpp>

#include "client/cpp/client.h"

namespace longspan::cli {

struct Invocation {
  // Global options.
  std::string server = "localhost:7077";
  std::string output = "table";
  double timeout_seconds = 60.0;
  bool quiet = false;

  // Set by the command that was named; answers the exit code.
  std::function<int()> action;

  // Values that the shell may complete, by option or positional.
  using Choices = std::function<std::vector<std::string>()>;
  std::map<const CLI::Option*, Choices> choices;

  bool json() const { return output == "json"; }
  std::unique_ptr<client::Client> connect() const;
};

// Refuse other numbers in plain words. 64-bit integers need a check: CLI11 wraps them around.
CLI::Validator positive();
CLI::Validator whole_number(int64_t minimum = 0);
// Completes an option with fixed values and refuses others.
void limit_to(Invocation& invocation, CLI::Option* option, std::vector<std::string> values);
// Completes ids of contexts, or names of methods, that the server knows; nothing when it is away.
void complete_context_ids(Invocation& invocation, CLI::Option* option);
void complete_method_names(Invocation& invocation, CLI::Option* option);

// Prints what is wrong and what to do about it on standard error; answers the exit code.
int report(const Invocation& invocation, const Status& status);

// Stable exit codes; the help lists them.
int exit_code(const Status& status);
extern const char* const kExitCodeHelp;

}  // namespace longspan::cli
