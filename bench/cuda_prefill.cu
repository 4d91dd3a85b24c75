// Checks and times attention of many rows on Hopper (kernels/cuda/attend_tiles.cu) without the rest
// of the library.
//
//   cuda_prefill [--quick] [--seed N] [--times-only] [--only TEXT] [--all-variants] [--json FILE]
//
// Three parts: the layouts that the kernel relies on, one by one; random cases against a naive
// kernel in double precision, which is itself compared with the host; times. A line PASS or FAIL a
// check. Where the device is lost, the program starts itself again behind the case that lost it.
// --quick leaves the times out; --only times the cases with this in their names; --all-variants
// times tiles that the policy does not choose, too; --json adds a line a timed case to a file.
#include <cstring>
#include <random>
#include <string>
#include <unistd.h>

#include "bench/cuda_prefill_cases.h"
#include "bench/cuda_prefill_layouts.h"
#include "bench/cuda_prefill_times.h"

namespace longspan::cuda {
namespace {

constexpr int kTileRows[] = {64, 128, 192};

struct Options {
  bool quick = false;
  bool times_only = false;
  TimeOptions times;
  uint64_t seed = std::random_device{}();
  size_t from = 0;   // the first case
  int failures = 0;  // of earlier starts
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const auto text = [&] { return i + 1 < argc ? argv[++i] : ""; };
    const auto number = [&] { return std::strtoull(text(), nullptr, 10); };
    if (std::strcmp(argv[i], "--quick") == 0) {
      options.quick = true;
    } else if (std::strcmp(argv[i], "--times-only") == 0) {
      options.times_only = true;
    } else if (std::strcmp(argv[i], "--only") == 0) {
      options.times.only = text();
    } else if (std::strcmp(argv[i], "--all-variants") == 0) {
      options.times.all_variants = true;
    } else if (std::strcmp(argv[i], "--json") == 0) {
      options.times.json = text();
    } else if (std::strcmp(argv[i], "--seed") == 0) {
      options.seed = number();
    } else if (std::strcmp(argv[i], "--from") == 0) {
      options.from = number();
    } else if (std::strcmp(argv[i], "--failures") == 0) {
      options.failures = static_cast<int>(number());
    } else {
      std::printf(
          "usage: %s [--quick] [--seed N] [--times-only] [--only TEXT] [--all-variants] "
          "[--json FILE]\n",
          argv[0]);
      std::exit(2);
    }
  }
  return options;
}

// Starts the program again at check `from`, with a device that works.
void start_again(const Options& options, char** argv, size_t from, int failures) {
  std::printf("  the device is lost: starting again\n");
  std::fflush(stdout);
  const std::string texts[] = {
      std::to_string(options.seed), std::to_string(from), std::to_string(failures)};
  std::vector<const char*> arguments = {argv[0],
                                        "--seed",
                                        texts[0].c_str(),
                                        "--from",
                                        texts[1].c_str(),
                                        "--failures",
                                        texts[2].c_str(),
                                        "--only",
                                        options.times.only.c_str(),
                                        "--json",
                                        options.times.json.c_str()};
  if (options.quick) {
    arguments.push_back("--quick");
  }
  if (options.times.all_variants) {
    arguments.push_back("--all-variants");
  }
  arguments.push_back(nullptr);
  execv("/proc/self/exe", const_cast<char**>(arguments.data()));
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  std::printf("seed %llu\n", static_cast<unsigned long long>(options.seed));
  int failures = options.failures;
  if (!options.times_only) {
    if (options.from == 0) {
      failures += check_layouts(options.seed);
    }
    // A layout that lost the device is told by the first case, which then starts again.
    const std::vector<Case> cases = make_cases();
    for (size_t i = options.from; i < std::size(kTileRows) * cases.size(); ++i) {
      const Case& c = cases[i / std::size(kTileRows)];
      const int tile_rows = kTileRows[i % std::size(kTileRows)];
      if (!has_tiles(c, tile_rows)) {
        continue;
      }
      bool lost = false;
      failures += !run_case(c, tile_rows, options.seed + i, &lost);
      std::fflush(stdout);
      if (lost) {
        start_again(options, argv, i + 1, failures);
      }
    }
    std::printf("%s: %d failures\n", failures == 0 ? "ALL PASS" : "FAILED", failures);
  }
  if (!options.quick) {
    failures += run_timings(options.times, options.seed);
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace longspan::cuda

int main(int argc, char** argv) { return longspan::cuda::run(argc, argv); }
