// Times of attention of many rows, dense and over lists of blocks.
#pragma once

#include "bench/cuda_prefill_cases.h"
#include "kernels/cuda/policy.h"

namespace longspan::cuda {
namespace {

constexpr double kPeakTeraflops = 790.0;
constexpr double kPeakTerabytes = 3.35;  // per second, of device memory

enum class Pattern { kDense, kRandom, kShared64, kShared128, kLocal };

struct Timing {
  Pattern pattern;
  int num_query_heads;
  int num_kv_heads;
  int dim;
  int64_t n;
  bool ordered_pages = false;
};

struct TimeOptions {
  bool all_variants = false;
  std::string json;  // a file to add a line a case to
  std::string only;  // cases with this in their name
};

const char* lists_name(Pattern pattern) {
  switch (pattern) {
    case Pattern::kDense:
      return "";
    case Pattern::kRandom:
      return " random lists";
    case Pattern::kShared64:
      return " shared lists of 64 rows";
    case Pattern::kShared128:
      return " shared lists of 128 rows";
    case Pattern::kLocal:
      return " local lists";
  }
  return "";
}

std::string case_name(const Timing& timing) {
  char name[160];
  std::snprintf(name,
                sizeof(name),
                "%s prefill %d/%d d%d %ldK%s%s",
                timing.pattern == Pattern::kDense ? "dense" : "selected",
                timing.num_query_heads,
                timing.num_kv_heads,
                timing.dim,
                static_cast<long>(timing.n / 1024),
                lists_name(timing.pattern),
                timing.ordered_pages ? ", pages in order" : "");
  return name;
}

// Lists of top-16 blocks, the own one among them; `own` is cut behind the row's token.
void add_blocks(SpanLists& lists, std::vector<int64_t> blocks, int64_t position) {
  const int64_t own = position / 64;
  std::sort(blocks.begin(), blocks.end());
  blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  for (int64_t block : blocks) {
    if (block < own) {
      lists.add(block * 64, block * 64 + 64);
    }
  }
  lists.add(own * 64, position + 1);
  lists.close();
}

// Rows of `shared_rows` neighbours (tokens times heads) share `shared` blocks and have the rest to
// themselves.
SpanLists make_lists(const Timing& timing, uint64_t seed) {
  std::mt19937_64 random(seed);
  SpanLists lists;
  const int group = timing.num_query_heads / timing.num_kv_heads;
  int64_t share_tokens = 64;
  int shared_count = 8;
  int own_count = 7;
  if (timing.pattern == Pattern::kRandom) {
    shared_count = 0;
    own_count = 15;
  } else if (timing.pattern != Pattern::kLocal) {
    share_tokens = (timing.pattern == Pattern::kShared64 ? 64 : 128) / group;
    shared_count = 15;
    own_count = 0;
  }
  std::vector<std::vector<int64_t>> shared(timing.num_kv_heads);
  for (int64_t row = 0; row < timing.n; ++row) {
    const int64_t own = std::max<int64_t>(row / 64, 1);
    if (timing.pattern == Pattern::kDense) {
      lists.add(0, row + 1);
      lists.close();
      continue;
    }
    for (auto& blocks : shared) {
      if (row % share_tokens == 0) {
        blocks.clear();
        for (int i = 0; i < shared_count; ++i) {
          blocks.push_back(static_cast<int64_t>(random() % own));
        }
      }
      std::vector<int64_t> all = blocks;
      for (int i = 0; i < own_count; ++i) {
        all.push_back(static_cast<int64_t>(random() % own));
      }
      add_blocks(lists, std::move(all), row);
    }
  }
  return lists;
}

// Pages that a tile goes through, on average.
double mean_union(const Timing& timing, const SpanLists& lists, int tile_rows) {
  const int group = timing.num_query_heads / timing.num_kv_heads;
  const int64_t tokens = tile_rows / group;
  const int heads = timing.pattern == Pattern::kDense ? 1 : timing.num_kv_heads;
  std::vector<int64_t> seen((timing.n + 63) / 64, -1);
  int64_t pages = 0;
  int64_t tiles = 0;
  for (int64_t first = 0; first < timing.n; first += tokens) {
    for (int head = 0; head < heads; ++head, ++tiles) {
      for (int64_t row = first; row < std::min(first + tokens, timing.n); ++row) {
        const int64_t list = row * heads + head;
        for (int64_t s = lists.offsets[list]; s < lists.offsets[list + 1]; ++s) {
          // Dense lists begin at 0: only what the last one has beyond the others is new.
          const int64_t last = (lists.spans[s].end - 1) / 64;
          for (int64_t page = last; page >= lists.spans[s].begin / 64; --page) {
            if (seen[page] != tiles) {
              seen[page] = tiles;
              ++pages;
            } else if (timing.pattern == Pattern::kDense) {
              break;
            }
          }
        }
      }
    }
  }
  return static_cast<double>(pages) / static_cast<double>(tiles);
}

double count_flop(const Timing& timing, const SpanLists& lists) {
  double tokens = 0;
  for (const Span& span : lists.spans) {
    tokens += static_cast<double>(span.end - span.begin);
  }
  const int heads = timing.pattern == Pattern::kDense
                        ? timing.num_query_heads
                        : timing.num_query_heads / timing.num_kv_heads;
  return tokens * heads * 4 * timing.dim;
}

struct Milliseconds {
  double median = 0;
  double least = 0;
  double most = 0;
};

Milliseconds measure(const AttendTilesArgs& args) {
  constexpr int kWarmUps = 3;
  constexpr double kBudget = 400;
  cudaEvent_t begin;
  cudaEvent_t end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<double> times;
  double spent = 0;
  for (int i = 0; i < 25 + kWarmUps && (i < 5 + kWarmUps || spent < kBudget); ++i) {
    cudaEventRecord(begin);
    launch_attend_tiles(args, nullptr);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float time = 0;
    cudaEventElapsedTime(&time, begin, end);
    if (i >= kWarmUps) {
      spent += time;
      times.push_back(time);
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

// What a timing is set against.
struct Work {
  double flop = 0;
  double bytes = 0;  // queries, keys and values read once, output written once

  double floor_ms() const { return std::max(flop / kPeakTeraflops, bytes / kPeakTerabytes) / 1e9; }
};

Work count_work(const Timing& timing, const SpanLists& lists) {
  const double heads = 2.0 * timing.num_query_heads + 2.0 * timing.num_kv_heads;
  return {count_flop(timing, lists), static_cast<double>(timing.n) * heads * timing.dim * 2};
}

void append_json(const TimeOptions& options,
                 const std::string& name,
                 const Milliseconds& time,
                 const Work& work,
                 bool right) {
  if (options.json.empty()) {
    return;
  }
  std::FILE* file = std::fopen(options.json.c_str(), "a");
  if (file == nullptr) {
    std::printf("cannot write %s\n", options.json.c_str());
    return;
  }
  std::fprintf(file,
               "{\"program\": \"cuda_prefill\", \"case\": \"%s\", \"ms\": %.6f, \"ms_min\": %.6f, "
               "\"ms_max\": %.6f, \"flops\": %.0f, \"bytes\": %.0f, \"floor_ms\": %.6f, "
               "\"ok\": %s}\n",
               name.c_str(),
               time.median,
               time.least,
               time.most,
               work.flop,
               work.bytes,
               work.floor_ms(),
               right ? "true" : "false");
  std::fclose(file);
}

// Neighbouring rows of a KV head that see the same pages.
int64_t alike_rows(const Timing& timing) {
  switch (timing.pattern) {
    case Pattern::kDense:
      return timing.n * timing.num_query_heads / timing.num_kv_heads;
    case Pattern::kShared64:
      return 64;
    case Pattern::kShared128:
      return 128;
    case Pattern::kRandom:
    case Pattern::kLocal:
      return 1;
  }
  return 1;
}

// Tile sizes to time: the policy's first.
std::vector<int> tile_choices(const Timing& timing, const Case& c, bool all_variants) {
  TileShape shape;
  shape.key_dim = timing.dim;
  shape.value_dim = timing.dim;
  shape.group = timing.num_query_heads / timing.num_kv_heads;
  std::vector<int> choices = {attend_tile_rows(shape, alike_rows(timing))};
  for (int tile_rows : {64, 128, 192}) {
    if (all_variants && tile_rows != choices.front() && has_tiles(c, tile_rows)) {
      choices.push_back(tile_rows);
    }
  }
  return choices;
}

// Returns false if the result is wrong, which the time then is worth nothing for.
bool run_timing(const Timing& timing, const TimeOptions& options, uint64_t seed) {
  const std::string name = case_name(timing);
  const SpanLists lists = make_lists(timing, seed);
  const bool dense = timing.pattern == Pattern::kDense;
  Case c{name.c_str(),
         timing.num_query_heads,
         timing.num_kv_heads,
         timing.dim,
         timing.dim,
         timing.n,
         timing.n,
         Lists::kCausal,
         dense ? 0 : 1};
  c.out_dtype = DataType::kBFloat16;
  c.ordered_pages = timing.ordered_pages;
  Problem problem(c, lists, seed);
  DeviceInfo device;
  device.l2_bytes = static_cast<size_t>(problem.properties.l2CacheSize);
  problem.args.section_heads = section_heads(c.num_kv_heads, timing.n * timing.dim * 4, device);
  const std::vector<int64_t> rows = {0, 1, 63, 64, timing.n / 3, timing.n / 2 + 5, timing.n - 1};
  const Expected expected = naive(problem, rows);
  const Work work = count_work(timing, lists);
  bool right = true;
  const std::vector<int> choices = tile_choices(timing, c, options.all_variants);
  for (int tile_rows : choices) {
    problem.args.tile_rows = tile_rows;
    problem.out.poison();
    problem.lse.poison();
    if (!succeeded(launch_attend_tiles(problem.args, nullptr), "launch") ||
        !succeeded(cudaDeviceSynchronize(), "attend_tiles")) {
      return false;
    }
    const bool same = compare_rows(c, problem, rows, expected);
    right = right && same;
    const Milliseconds time = measure(problem.args);
    const double rate = work.flop / time.median / 1e9;
    const double pages = mean_union(timing, lists, tile_rows);
    const int group = c.num_query_heads / c.num_kv_heads;
    const double tiles =
        std::ceil(static_cast<double>(timing.n) / (tile_rows / group)) * c.num_kv_heads;
    std::printf(
        "%s %-52s tile %3d: %8.3f ms (%.3f to %.3f) %6.1f TFLOP/s %.2f of peak, union %.1f pages, "
        "%.2f TB/s into SMs\n",
        same ? "TIME" : "FAIL",
        name.c_str(),
        tile_rows,
        time.median,
        time.least,
        time.most,
        rate,
        rate / kPeakTeraflops,
        pages,
        tiles * pages * 64 * timing.dim * 4 / time.median / 1e9);
    std::fflush(stdout);
    if (tile_rows == choices.front()) {
      append_json(options, name, time, work, same);
    }
  }
  return right;
}

int run_timings(const TimeOptions& options, uint64_t seed) {
  constexpr int64_t kK = 1024;
  const int shapes[][3] = {{32, 8, 128}, {64, 4, 128}, {32, 8, 64}};
  std::vector<Timing> timings;
  for (const auto& shape : shapes) {
    for (int64_t n : {8 * kK, 32 * kK, 64 * kK, 128 * kK}) {
      timings.push_back({Pattern::kDense, shape[0], shape[1], shape[2], n});
    }
  }
  timings.push_back({Pattern::kDense, 32, 8, 128, 64 * kK, /*ordered_pages=*/true});
  timings.push_back({Pattern::kRandom, 64, 4, 128, 32 * kK});
  for (Pattern pattern :
       {Pattern::kRandom, Pattern::kShared64, Pattern::kShared128, Pattern::kLocal}) {
    timings.push_back({pattern, 64, 4, 128, 64 * kK});
    timings.push_back({pattern, 32, 8, 128, 64 * kK});
  }
  int failures = 0;
  for (const Timing& timing : timings) {
    if (case_name(timing).find(options.only) != std::string::npos) {
      failures += !run_timing(timing, options, seed);
    }
  }
  return failures;
}

}  // namespace
}  // namespace longspan::cuda
