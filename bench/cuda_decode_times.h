// The times of cuda_decode: single launches, and replays of a graph of many.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "bench/cuda_decode_inputs.h"

namespace longspan::cuda {
namespace {

constexpr double kAimBytesPerSecond = 3.0e12;

// How a case is run, and what it is to tell.
enum class Form {
  kSpans,
  kPages,
  kPagesWarm,    // the same lists again and again: what L2 holds
  kPagesUnused,  // lists without tokens: what is left without keys and values
};

struct TimedCase {
  std::string name;
  int num_query_heads;
  int num_kv_heads;
  int dim;
  int64_t num_tokens;  // of a context
  int num_rows = 1;    // contexts, if more than one
  int num_blocks = 0;  // selected by each list; 0: dense
  int block_tokens = kPageTokens;
  bool list_per_kv_head = true;
  Form form = Form::kSpans;
  // Of pages:
  int max_cluster_size = 16;
  int blocks_per_sm = 2;
};

struct TimeOptions {
  std::string only;  // cases with this in their name
  std::string json;  // a file to add a line a case to
  bool checked = true;
  uint64_t seed = 0;
};

// Contexts that take turns, so that no input of a launch is in L2.
class TimedProblem {
 public:
  TimedProblem(const TimedCase& c,
               const Memory<std::byte>& arena,
               const Device& device,
               Random& random)
      : case_(c),
        query_(static_cast<size_t>(c.num_rows) * c.num_query_heads * c.dim),
        out_(query_.size()),
        lse_(static_cast<size_t>(c.num_rows) * c.num_query_heads) {
    fill_normal<<<64, 256>>>(DataType::kBFloat16, query_.data(), query_.size(), 1.0F, random());
    PagedView& kv = base_.params.kv;
    kv.num_entries = c.num_tokens;
    kv.num_kv_heads = c.num_kv_heads;
    kv.key_dim = kv.value_dim = c.dim;
    kv.arena = arena.data();
    kv.arena_bytes = arena.size();
    const auto arena_pages = static_cast<int64_t>(arena.size() / kv.page_bytes());
    std::vector<const std::byte*> pages;
    for (int64_t i = 0; i < arena_pages; ++i) {
      pages.push_back(arena.data() + static_cast<size_t>(i) * kv.page_bytes());
    }
    std::shuffle(pages.begin(), pages.end(), random);
    pages_ = std::make_unique<Memory<const std::byte*>>(pages);
    AttendParams& params = base_.params;
    params.query = reinterpret_cast<const float*>(query_.data());
    params.query_dtype = params.out_dtype = DataType::kBFloat16;
    params.num_rows = c.num_rows;
    params.num_query_heads = c.num_query_heads;
    params.num_selection_heads = c.num_blocks > 0 && c.list_per_kv_head ? c.num_kv_heads : 1;
    params.scale = 1.0F / std::sqrt(static_cast<float>(c.dim));
    params.out = reinterpret_cast<float*>(out_.data());
    params.lse = lse_.data();
    base_.num_sms = device.num_sms;
    base_.shared_memory_per_block = device.shared_memory;
    const int64_t pages_a_turn = c.num_rows * (c.num_tokens / kPageTokens);
    const int64_t distinct = c.form == Form::kPagesWarm ? 1
                             : c.num_blocks > 0
                                 ? 8
                                 : std::clamp<int64_t>(arena_pages / pages_a_turn, 1, 8);
    for (int64_t turn = 0; turn < distinct; ++turn) {
      add_turn(c.num_blocks > 0 ? 0 : turn * pages_a_turn, random);
    }
    workspace_ = std::make_unique<Memory<std::byte>>(decode_workspace_bytes(base_));
  }

  double bytes() const {
    const int64_t tokens =
        case_.num_blocks > 0 ? int64_t{case_.num_blocks} * case_.block_tokens : case_.num_tokens;
    return case_.form == Form::kPagesUnused ? 0.0
                                            : static_cast<double>(tokens) * case_.num_rows *
                                                  case_.num_kv_heads * case_.dim * 4.0;
  }

  cudaError_t launch(int turn, cudaStream_t stream) {
    const auto i = static_cast<size_t>(turn) % spans_.size();
    const std::byte* const* const* row_pages = case_.num_rows > 1 ? tables_[i]->data() : nullptr;
    if (case_.form != Form::kSpans) {
      AttendPagesArgs args;
      args.params = base_.params;
      args.params.kv.pages = pages_->data() + first_page_[i];
      args.row_pages = row_pages;
      args.page_lists = page_lists_[i]->data();
      args.max_pages = case_.num_blocks;
      args.num_sms = base_.num_sms;
      args.shared_memory_per_block = base_.shared_memory_per_block;
      args.max_cluster_size = case_.max_cluster_size;
      args.blocks_per_sm = case_.blocks_per_sm;
      return launch_attend_pages(args, stream);
    }
    DecodeArgs args = base_;
    args.params.kv.pages = pages_->data() + first_page_[i];
    args.row_pages = row_pages;
    args.params.spans = spans_[i]->data();
    args.params.span_offsets = offsets_[i]->data();
    args.workspace = workspace_->data();
    return launch_attend_decode(args, stream);
  }

  // Whether the last launch left numbers only.
  bool is_finite() const {
    const std::vector<float> lse = lse_.host();
    return case_.form == Form::kPagesUnused ||
           std::all_of(lse.begin(), lse.end(), [](float value) { return std::isfinite(value); });
  }

 private:
  void add_turn(int64_t first_page, Random& random) {
    const AttendParams& params = base_.params;
    std::vector<Span> spans;
    std::vector<int64_t> offsets = {0};
    std::vector<const std::byte* const*> tables;
    for (int row = 0; row < case_.num_rows; ++row) {
      tables.push_back(pages_->data() + first_page + row * (case_.num_tokens / kPageTokens));
      for (int s = 0; s < params.num_selection_heads; ++s) {
        if (case_.num_blocks == 0) {
          spans.push_back({0, case_.num_tokens});
        } else {
          std::vector<int64_t> blocks(static_cast<size_t>(case_.num_tokens / case_.block_tokens));
          std::iota(blocks.begin(), blocks.end(), 0);
          std::vector<int64_t> selected;
          std::sample(
              blocks.begin(), blocks.end(), std::back_inserter(selected), case_.num_blocks, random);
          for (const int64_t block : selected) {
            spans.push_back({block * case_.block_tokens, (block + 1) * case_.block_tokens});
          }
        }
        offsets.push_back(static_cast<int64_t>(spans.size()));
      }
    }
    std::vector<PageTokens> entries;
    for (const Span& span : spans) {
      const auto end = static_cast<int16_t>(case_.form == Form::kPagesUnused ? 0 : kPageTokens);
      entries.push_back({static_cast<int32_t>(span.begin / kPageTokens), 0, end});
    }
    page_lists_.push_back(std::make_unique<Memory<PageTokens>>(entries));
    first_page_.push_back(first_page);
    spans_.push_back(std::make_unique<Memory<Span>>(spans));
    offsets_.push_back(std::make_unique<Memory<int64_t>>(offsets));
    tables_.push_back(std::make_unique<Memory<const std::byte* const*>>(tables));
  }

  TimedCase case_;
  DecodeArgs base_;
  Memory<uint16_t> query_;
  Memory<uint16_t> out_;
  Memory<float> lse_;
  std::unique_ptr<Memory<const std::byte*>> pages_;
  std::unique_ptr<Memory<std::byte>> workspace_;
  std::vector<int64_t> first_page_;
  std::vector<std::unique_ptr<Memory<Span>>> spans_;
  std::vector<std::unique_ptr<Memory<PageTokens>>> page_lists_;
  std::vector<std::unique_ptr<Memory<int64_t>>> offsets_;
  std::vector<std::unique_ptr<Memory<const std::byte* const*>>> tables_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0.0 : values[values.size() / 2];
}

// Microseconds of `work`, which `repeats` runs of it took together.
double time_once(cudaStream_t stream, int repeats, const std::function<void()>& work) {
  cudaEvent_t start;
  cudaEvent_t stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  cudaEventRecord(start, stream);
  work();
  cudaEventRecord(stop, stream);
  cudaEventSynchronize(stop);
  float milliseconds = 0.0F;
  cudaEventElapsedTime(&milliseconds, start, stop);
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return milliseconds * 1e3 / repeats;
}

constexpr int kSamples = 25;

// Of single launches, in microseconds.
std::vector<double> time_launches(TimedProblem& problem, cudaStream_t stream) {
  std::vector<double> times;
  for (int i = 0; i < kSamples; ++i) {
    times.push_back(time_once(stream, 1, [&] { problem.launch(i, stream); }));
  }
  return times;
}

// Of a launch in a graph of many, in microseconds.
std::vector<double> time_replays(TimedProblem& problem, cudaStream_t stream) {
  constexpr int kGraphLaunches = 16;
  constexpr int kWarmUp = 2;
  std::vector<double> times;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  for (int i = 0; i < kGraphLaunches; ++i) {
    problem.launch(i, stream);
  }
  if (!succeeded(cudaStreamEndCapture(stream, &graph), "capture") ||
      !succeeded(cudaGraphInstantiate(&executable, graph, 0), "instantiate")) {
    return times;
  }
  for (int i = 0; i < kSamples + kWarmUp; ++i) {
    const double time =
        time_once(stream, kGraphLaunches, [&] { cudaGraphLaunch(executable, stream); });
    if (i >= kWarmUp) {
      times.push_back(time);
    }
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  return times;
}

void append_json(const TimeOptions& options,
                 const TimedCase& c,
                 double bytes,
                 const std::vector<double>& replays,
                 bool ok) {
  std::FILE* file = options.json.empty() ? nullptr : std::fopen(options.json.c_str(), "a");
  if (file == nullptr) {
    return;
  }
  const auto [least, most] = std::minmax_element(replays.begin(), replays.end());
  std::fprintf(file,
               "{\"program\": \"cuda_decode\", \"case\": \"%s\", \"ms\": %.6f, \"ms_min\": %.6f, "
               "\"ms_max\": %.6f, \"bytes\": %.0f, \"floor_ms\": %.6f, \"ok\": %s}\n",
               c.name.c_str(),
               median(replays) / 1e3,
               *least / 1e3,
               *most / 1e3,
               bytes,
               bytes / kAimBytesPerSecond * 1e3,
               ok ? "true" : "false");
  std::fclose(file);
}

// False if it cannot be run.
bool time_case(const TimedCase& c,
               const Memory<std::byte>& arena,
               const Device& device,
               const TimeOptions& options,
               Random& random) {
  TimedProblem problem(c, arena, device, random);
  cudaStream_t stream = nullptr;
  cudaStreamCreate(&stream);
  bool ok = true;
  for (int i = 0; i < 3 && ok; ++i) {
    ok = succeeded(problem.launch(i, stream), c.name.c_str());
  }
  ok = succeeded(cudaStreamSynchronize(stream), c.name.c_str()) && ok && problem.is_finite();
  if (!ok) {
    std::printf("FAIL %s\n", c.name.c_str());
    cudaStreamDestroy(stream);
    return false;
  }
  const std::vector<double> single = time_launches(problem, stream);
  const std::vector<double> replays = time_replays(problem, stream);
  ok = succeeded(cudaStreamSynchronize(stream), c.name.c_str()) && !replays.empty();
  cudaStreamDestroy(stream);
  if (!ok) {
    return false;
  }
  const double bytes = problem.bytes();
  std::printf(
      "TIME %-52s %8.1f MB | launch %8.2f us (best %8.2f) | graph %8.2f us (best %8.2f) %6.0f "
      "GB/s, "
      "%5.1f%% of 3000\n",
      c.name.c_str(),
      bytes / 1e6,
      median(single),
      *std::min_element(single.begin(), single.end()),
      median(replays),
      *std::min_element(replays.begin(), replays.end()),
      bytes / median(replays) / 1e3,
      100.0 * bytes / (median(replays) * 1e-6) / kAimBytesPerSecond);
  std::fflush(stdout);
  append_json(options, c, bytes, replays, options.checked);
  return true;
}

// Contexts of 1M tokens of which each KV head selects some blocks, by each way to attend to them.
std::vector<TimedCase> selected_cases() {
  constexpr int64_t kTokens = 1024 * 1024;
  std::vector<TimedCase> cases;
  for (const auto& [query_heads, kv_heads] : {std::pair{32, 8}, {64, 4}, {32, 2}}) {
    for (const int blocks : {16, 64}) {
      const TimedCase c = {"selected decode " + std::to_string(query_heads) + "/" +
                               std::to_string(kv_heads) + " d128 1M top-" + std::to_string(blocks),
                           query_heads,
                           kv_heads,
                           128,
                           kTokens,
                           1,
                           blocks};
      const auto add = [&](const char* suffix, Form form, int cluster_size = 16, int per_sm = 2) {
        cases.push_back(c);
        cases.back().name += suffix;
        cases.back().form = form;
        cases.back().max_cluster_size = cluster_size;
        cases.back().blocks_per_sm = per_sm;
      };
      add("", Form::kPages);
      add(", one block an SM", Form::kPages, 16, 1);
      add(", clusters of 8", Form::kPages, 8);
      add(", clusters of 8, one block an SM", Form::kPages, 8, 1);
      add(", clusters of 4", Form::kPages, 4);
      add(", in L2", Form::kPagesWarm);
      add(", nothing selected", Form::kPagesUnused);
      add(", nothing selected, one block an SM", Form::kPagesUnused, 16, 1);
      add(", as spans", Form::kSpans);
    }
  }
  return cases;
}

std::vector<TimedCase> timed_cases() {
  constexpr int64_t kK = 1024;
  std::vector<TimedCase> cases = {
      {"dense decode 32/8 d128 16K", 32, 8, 128, 16 * kK},
      {"dense decode 64/4 d128 16K", 64, 4, 128, 16 * kK},
      {"dense decode 32/2 d128 16K", 32, 2, 128, 16 * kK},
      {"dense decode 32/8 d128 128K", 32, 8, 128, 128 * kK},
      {"dense decode 64/4 d128 128K", 64, 4, 128, 128 * kK},
      {"dense decode 32/2 d128 128K", 32, 2, 128, 128 * kK},
      {"dense decode 32/8 d64 128K", 32, 8, 64, 128 * kK},
      {"dense decode 16/2 d256 128K", 16, 2, 256, 128 * kK},
      {"dense decode 32/8 d128 1M", 32, 8, 128, 1024 * kK},
      {"dense decode 64/4 d128 1M", 64, 4, 128, 1024 * kK},
      {"dense decode 32/2 d128 1M", 32, 2, 128, 1024 * kK},
      {"dense decode 32/8 d64 1M", 32, 8, 64, 1024 * kK},
      {"selected decode 32/8 d128 1M top-64, one list", 32, 8, 128, 1024 * kK, 1, 64, 64, false},
      {"selected decode 32/8 d128 1M top-256 of 16", 32, 8, 128, 1024 * kK, 1, 256, 16},
      {"batch 64 decode 32/8 d128 8K", 32, 8, 128, 8 * kK, 64},
      {"batch 8 decode 64/4 d128 8K", 64, 4, 128, 8 * kK, 8},
      {"batch 128 decode 32/8 d128 1K", 32, 8, 128, kK, 128},
      {"batch 64 selected decode 32/8 d128 8K top-16, as spans", 32, 8, 128, 8 * kK, 64, 16},
  };
  cases.push_back(cases.back());
  cases.back().name = "batch 64 selected decode 32/8 d128 8K top-16";
  cases.back().form = Form::kPages;
  const std::vector<TimedCase> selected = selected_cases();
  cases.insert(cases.end(), selected.begin(), selected.end());
  return cases;
}

// False if a case cannot be run.
bool run_times(const TimeOptions& options, const Device& device) {
  constexpr size_t kArenaBytes = size_t{4} << 30;  // 1M tokens of 8 KV heads, d 128
  const Memory<std::byte> arena(kArenaBytes);
  fill_normal<<<4096, 256>>>(
      DataType::kBFloat16, arena.data(), kArenaBytes / 2, 1.0F, options.seed);
  bool ok = succeeded(cudaDeviceSynchronize(), "fill");
  Random random(options.seed);
  for (const TimedCase& c : timed_cases()) {
    if (c.name.find(options.only) != std::string::npos) {
      ok = time_case(c, arena, device, options, random) && ok;
    }
  }
  return ok;
}

}  // namespace
}  // namespace longspan::cuda
