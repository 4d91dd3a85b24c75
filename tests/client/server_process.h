// A real `longspan serve` process for tests in C++, from $LONGSPAN_BINARY; ended with the object.
#pragma once

#include <string>
#include <sys/types.h>
#include <vector>

namespace longspan::testing {

class ServerProcess {
 public:
  // Waits for the ready line; the test fails fatally without one.
  explicit ServerProcess(const std::vector<std::string>& flags);
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;
  ~ServerProcess();

  const std::string& address() const { return address_; }
  // SIGTERM; answers the exit code.
  int terminate();

 private:
  pid_t process_ = -1;
  int output_ = -1;  // read end of its standard output
  std::string address_;
};

}  // namespace longspan::testing
