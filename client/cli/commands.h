// The commands of `longspan`. Each function adds one command, whose callback sets the invocation's
// action; all state lives as long as the App.
#pragma once

#include <CLI/App.hpp>

#include "client/cli/invocation.h"

namespace longspan::cli {

void add_serve_command(CLI::App& app, Invocation& invocation);
void add_config_command(CLI::App& app, Invocation& invocation);
void add_context_command(CLI::App& app, Invocation& invocation);
void add_methods_command(CLI::App& app, Invocation& invocation);
void add_explain_command(CLI::App& app, Invocation& invocation);
void add_bench_command(CLI::App& app, Invocation& invocation);
void add_completion_command(CLI::App& app, Invocation& invocation);
void add_version_command(CLI::App& app, Invocation& invocation);

// What `longspan WORDS` may go on with; the last word is the one being typed. The completion
// scripts call it through `longspan __complete`.
std::vector<std::string> complete(CLI::App& app,
                                  const Invocation& invocation,
                                  const std::vector<std::string>& words);

}  // namespace longspan::cli
