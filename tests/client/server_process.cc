#include "tests/client/server_process.h"

#include <cstdio>
#include <cstdlib>
#include <regex>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#include <spawn.h>

#include "base/status.h"

namespace longspan::testing {
namespace {

// Reads lines until the one that says where the server is; empty when the output ends before.
std::string wait_for_address(int output) {
  static const std::regex kReady("serving on (\\S+) ");
  std::string text;
  char byte = 0;
  while (read(output, &byte, 1) == 1) {
    text += byte;
    std::smatch match;
    if (byte == '\n' && std::regex_search(text, match, kReady)) {
      return match[1];
    }
  }
  std::fprintf(stderr, "the server did not start:\n%s\n", text.c_str());
  return "";
}

}  // namespace

ServerProcess::ServerProcess(const std::vector<std::string>& flags) {
  const char* binary = std::getenv("LONGSPAN_BINARY");
  LONGSPAN_CHECK(binary != nullptr);
  std::vector<std::string> words = {binary, "serve", "--port", "0", "--metrics-port", "0"};
  words.insert(words.end(), flags.begin(), flags.end());
  std::vector<char*> arguments;
  arguments.reserve(words.size() + 1);
  for (std::string& word : words) {
    arguments.push_back(word.data());
  }
  arguments.push_back(nullptr);

  int ends[2] = {-1, -1};
  LONGSPAN_CHECK(pipe(ends) == 0);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_addclose(&actions, ends[0]);
  LONGSPAN_CHECK(posix_spawn(&process_, binary, &actions, nullptr, arguments.data(), environ) == 0);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  output_ = ends[0];
  address_ = wait_for_address(output_);
  LONGSPAN_CHECK(!address_.empty());
}

int ServerProcess::terminate() {
  const pid_t process = std::exchange(process_, -1);
  if (process < 0) {
    return 0;
  }
  kill(process, SIGTERM);
  int status = 0;
  waitpid(process, &status, 0);
  close(output_);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

ServerProcess::~ServerProcess() { terminate(); }

}  // namespace longspan::testing
