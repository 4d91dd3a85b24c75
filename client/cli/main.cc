// The `longspan` command: runs the embedded server, and talks to servers.
#include <cstdio>
#include <cstdlib>
#include <exception>

#include <CLI/CLI.hpp>

#include "client/cli/commands.h"

namespace longspan::cli {
namespace {

void add_global_options(CLI::App& app, Invocation& invocation) {
  app.add_option("-s,--server", invocation.server, "host:port of the server (LONGSPAN_SERVER)")
      ->capture_default_str();
  limit_to(
      invocation,
      app.add_option("-o,--output", invocation.output, "form of the output")->capture_default_str(),
      {"table", "json"});
  app.add_option("--timeout", invocation.timeout_seconds, "seconds for a call with its repeats")
      ->check(positive())
      ->capture_default_str();
  app.add_flag("-q,--quiet", invocation.quiet, "no progress");
}

// What was wrong, and whose help to read.
std::string usage_error(const CLI::App* app, const CLI::Error& error) {
  std::string command = app->get_name();
  const CLI::App* place = app;
  while (!place->get_subcommands().empty()) {
    place = place->get_subcommands().front();
    command += " " + place->get_name();
  }
  const std::vector<std::string> unknown = app->remaining(true);
  const std::string what =
      unknown.empty() ? error.what() : "there is no `" + unknown.front() + "` here";
  return "longspan: " + what + "\nRun `" + command + " --help` for the usage.\n";
}

int run(int argc, char** argv) {
  CLI::App app("Attention over million-token contexts, as a service.", "longspan");
  Invocation invocation;
  if (const char* server = std::getenv("LONGSPAN_SERVER"); server != nullptr) {
    invocation.server = server;
  }
  app.require_subcommand(1);
  app.footer(kExitCodeHelp);
  app.failure_message(usage_error);
  // Global options may stand after the command, too.
  app.fallthrough();
  add_global_options(app, invocation);
  add_serve_command(app, invocation);
  add_config_command(app, invocation);
  add_context_command(app, invocation);
  add_methods_command(app, invocation);
  add_explain_command(app, invocation);
  add_bench_command(app, invocation);
  add_completion_command(app, invocation);
  add_version_command(app, invocation);

  // Before parsing: the words may end in the middle of anything.
  if (argc > 1 && std::string(argv[1]) == "__complete") {
    for (const std::string& word : complete(app, invocation, {argv + 2, argv + argc})) {
      std::printf("%s\n", word.c_str());
    }
    return 0;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // Zero for --help; every mistake is wrong usage.
    return app.exit(error) == 0 ? 0 : 2;
  }
  return invocation.action();
}

}  // namespace
}  // namespace longspan::cli

int main(int argc, char** argv) {
  try {
    return longspan::cli::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "longspan: INTERNAL: %s\n", error.what());
    return 1;
  }
}
