// Checks and times split-KV decode on Hopper (kernels/cuda/attend_decode.cu, attend_pages.cu)
// without the rest of the library.
//
//   cuda_decode [--quick] [--times-only] [--only TEXT] [--seed N] [--from N] [--json FILE]
//
// A line PASS or FAIL a check. Where the device is lost, the program starts itself again behind the
// check that lost it. --only times the cases with TEXT in their name; --json adds a line a timed
// case to a file.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <unistd.h>
#include <vector>

#include "bench/cuda_decode_checks.h"
#include "bench/cuda_decode_times.h"

namespace longspan::cuda {
namespace {

struct Options {
  bool quick = false;
  bool times_only = false;
  uint64_t seed = 0;
  size_t from = 0;
  int failed = 0;  // before a restart
  std::string only;
  std::string json;
};

// The device is lost with the process, so a new one goes on.
[[noreturn]] void restart(const Options& options, size_t from, int failed) {
  std::fflush(stdout);
  const std::string seed = std::to_string(options.seed);
  const std::string first = std::to_string(from);
  const std::string failures = std::to_string(failed);
  std::vector<const char*> arguments = {"cuda_decode",
                                        "--seed",
                                        seed.c_str(),
                                        "--from",
                                        first.c_str(),
                                        "--failed",
                                        failures.c_str(),
                                        "--only",
                                        options.only.c_str(),
                                        "--json",
                                        options.json.c_str()};
  if (options.quick) {
    arguments.push_back("--quick");
  }
  arguments.push_back(nullptr);
  execv("/proc/self/exe", const_cast<char**>(arguments.data()));
  std::exit(3);
}

int run_checks(const Options& options, const Device& device) {
  const std::vector<Check> checks = make_checks(options.seed);
  int failed = options.failed;
  for (size_t i = options.from; i < checks.size(); ++i) {
    Random random(options.seed + 1000 * i);
    std::printf("check %zu %s\n", i, checks[i].name.c_str());
    std::fflush(stdout);
    const bool ok = checks[i].run(device, random);
    std::printf("%s %zu %s\n", ok ? "PASS" : "FAIL", i, checks[i].name.c_str());
    failed += ok ? 0 : 1;
    if (cudaDeviceSynchronize() != cudaSuccess) {
      restart(options, i + 1, failed);
    }
  }
  std::printf(
      "%s: %d of %zu checks failed\n", failed == 0 ? "PASS" : "FAIL", failed, checks.size());
  return failed;
}

Options parse(int argc, char** argv) {
  Options options;
  options.seed = std::random_device()();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto text = [&] { return std::string(i + 1 < argc ? argv[++i] : ""); };
    const auto number = [&] { return std::strtoull(text().c_str(), nullptr, 10); };
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--times-only") {
      options.times_only = true;
    } else if (argument == "--seed") {
      options.seed = number();
    } else if (argument == "--from") {
      options.from = number();
    } else if (argument == "--failed") {
      options.failed = static_cast<int>(number());
    } else if (argument == "--only") {
      options.only = text();
    } else if (argument == "--json") {
      options.json = text();
    } else {
      std::printf("unknown argument %s\n", argument.c_str());
      std::exit(2);
    }
  }
  return options;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  cudaDeviceProp properties = {};
  if (!succeeded(cudaGetDeviceProperties(&properties, 0), "device")) {
    return 2;
  }
  Device device = {properties.multiProcessorCount, properties.sharedMemPerBlockOptin};
  if (!succeeded(cudaStreamCreate(&device.stream), "stream")) {
    return 2;
  }
  std::printf("%s, %d SMs, %zu bytes of shared memory, seed %lu\n",
              properties.name,
              device.num_sms,
              device.shared_memory,
              static_cast<unsigned long>(options.seed));
  const int failed = options.times_only ? 0 : run_checks(options, device);
  const bool timed =
      options.quick ||
      run_times({options.only, options.json, !options.times_only && failed == 0, options.seed},
                device);
  return failed == 0 && timed ? 0 : 1;
}

}  // namespace
}  // namespace longspan::cuda

int main(int argc, char** argv) { return longspan::cuda::run(argc, argv); }
