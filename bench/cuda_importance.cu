// Checks and times NSA's importance of blocks (kernels/cuda/importance.h), and the two steps that a
// selection of blocks costs: attention over the compressed windows, which gives the log-sum-exp,
// and importance with top-k.
//
//   cuda_importance [--quick] [--seed N] [--only TEXT] [--json FILE]
//
// Checks first, against double precision on the same inputs. --only takes the checks and times with
// TEXT in their name; --json adds a line a timed case to a file.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "bench/cuda_importance_check.h"
#include "bench/cuda_support.h"
#include "kernels/cuda/attend_tiles.h"
#include "kernels/cuda/convert.h"
#include "kernels/cuda/importance.h"
#include "kernels/cuda/policy.h"
#include "kernels/page.h"

namespace longspan::cuda {
namespace {

int run_checks(const DeviceInfo& device, const BenchOptions& options) {
  int failures = 0;
  int number = 0;
  for (const ImportanceCase& c : importance_cases()) {
    std::mt19937_64 random(options.seed + static_cast<uint64_t>(number++));
    if (describe(c).find(options.only) != std::string::npos) {
      failures += run_importance_case(c, device, random) ? 0 : 1;
    }
  }
  std::printf("%s: %d checks failed\n", failures == 0 ? "OK" : "FAILED", failures);
  return failures;
}

struct Timing {
  int query_heads;
  int kv_heads;
  int64_t tokens;
  int window_tokens;
  int stride_tokens;
  int64_t rows;  // of queries: the last ones
};

std::string case_name(const char* what, const Timing& timing) {
  char text[160];
  std::snprintf(text,
                sizeof(text),
                "%s %d/%d d128 %lldK%s%s",
                what,
                timing.query_heads,
                timing.kv_heads,
                static_cast<long long>(timing.tokens / 1024),
                timing.stride_tokens == 64 ? " pooled" : "",
                timing.rows == 1 ? " decode" : "");
  return text;
}

// Row `row` [0, 1): probabilities [H][n] of the visible windows, from lse in double.
__global__ void probabilities_kernel(const ImportanceArgs args,
                                     int64_t row,
                                     double* probabilities,
                                     double* lse) {
  const ImportanceShape& shape = args.shape;
  const int head = static_cast<int>(blockIdx.x);
  const int64_t visible = args.visible_windows[row];
  double* own = probabilities + head * shape.num_windows;
  for (int64_t window = threadIdx.x; window < visible; window += blockDim.x) {
    const size_t query = static_cast<size_t>((row * shape.num_query_heads + head) * shape.dim);
    const size_t key = (static_cast<size_t>(head / shape.group()) * kPageTokens +
                        static_cast<size_t>(window % kPageTokens)) *
                       static_cast<size_t>(shape.dim);
    double sum = 0;
    for (int d = 0; d < shape.dim; ++d) {
      const auto channel = static_cast<size_t>(d);
      sum += static_cast<double>(load_as_float(shape.query_dtype, args.query, query + channel)) *
             load_as_float(shape.dtype, args.pages[window / kPageTokens], key + channel);
    }
    own[window] = sum * static_cast<double>(args.scale);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double largest = -INFINITY;
    for (int64_t window = 0; window < visible; ++window) {
      largest = own[window] > largest ? own[window] : largest;
    }
    double sum = 0;
    for (int64_t window = 0; window < visible; ++window) {
      sum += exp(own[window] - largest);
    }
    lse[head] = visible > 0 ? largest + log(sum) : -INFINITY;
  }
  __syncthreads();
  for (int64_t window = threadIdx.x; window < visible; window += blockDim.x) {
    own[window] = exp(own[window] - lse[head]);
  }
}

// Everything that a selection needs, on random inputs.
class Problem {
 public:
  Problem(const Timing& timing, const DeviceInfo& device)
      : timing_(timing),
        shape_(make_shape(timing)),
        plan_(plan_importance(shape_, device)),
        arena_(static_cast<size_t>(num_pages()) * page_elements()),
        query_(static_cast<size_t>(timing.rows * timing.query_heads * shape_.dim)),
        out_(query_.size()),
        lse_(static_cast<size_t>(timing.rows * timing.query_heads)),
        scores_(static_cast<size_t>(timing.rows * timing.kv_heads * shape_.max_k)),
        ids_(scores_.size()),
        workspace_(plan_.workspace_bytes),
        tickets_(std::vector<uint32_t>(static_cast<size_t>(plan_.num_tickets), 0U)) {
    fill(arena_.data(), arena_.size(), 1);
    fill(query_.data(), query_.size(), 7);
    std::vector<const std::byte*> pages;
    for (int64_t i = 0; i < num_pages(); ++i) {
      pages.push_back(reinterpret_cast<const std::byte*>(arena_.data() +
                                                         static_cast<size_t>(i) * page_elements()));
    }
    pages_ = std::make_unique<Device<const std::byte*>>(pages);
    make_rows();
    make_args(device);
  }

  const ImportancePlan& plan() const { return plan_; }
  void attend(cudaStream_t stream) const { CHECK_CUDA(launch_attend_tiles(attend_, stream)); }
  void search(cudaStream_t stream) const {
    CHECK_CUDA(launch_importance(args_, plan_, workspace_.data(), tickets_.data(), stream));
  }

  // Products of visible windows and query heads, in channels.
  double pairs() const {
    double visible = 0;
    for (const int64_t n : host_visible_) {
      visible += static_cast<double>(n);
    }
    return visible * timing_.query_heads * shape_.dim;
  }
  double key_bytes() const {
    return 2.0 * static_cast<double>(shape_.num_windows) * shape_.num_kv_heads * shape_.dim;
  }
  double query_bytes() const { return 2.0 * static_cast<double>(query_.size()); }

  // Log-sum-exp and lists of some rows against double precision.
  bool verify() const {
    const std::vector<float> lse = lse_.host();
    const std::vector<float> scores = scores_.host();
    const std::vector<int64_t> ids = ids_.host();
    const auto heads = static_cast<size_t>(timing_.query_heads);
    const Device<double> probabilities(heads * static_cast<size_t>(shape_.num_windows));
    const Device<double> expected_lse(heads);
    bool right = true;
    for (const int64_t row : {int64_t{0}, timing_.rows / 3, timing_.rows - 1}) {
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(static_cast<unsigned>(timing_.query_heads));
      config.blockDim = dim3(256);
      CHECK_CUDA(cudaLaunchKernelEx(
          &config, probabilities_kernel, args_, row, probabilities.data(), expected_lse.data()));
      CHECK_CUDA(cudaDeviceSynchronize());
      const std::vector<double> expected = expected_lse.host();
      for (size_t head = 0; head < heads; ++head) {
        const double got = static_cast<double>(lse[static_cast<size_t>(row) * heads + head]);
        if (got != expected[head] && !(std::abs(got - expected[head]) < 1e-3)) {
          std::printf("  row %lld head %zu: lse %.9g expected %.9g\n",
                      static_cast<long long>(row),
                      head,
                      got,
                      expected[head]);
          right = false;
        }
      }
      right = check_lists(row, probabilities.host(), scores, ids) && right;
    }
    return right;
  }

 private:
  static ImportanceShape make_shape(const Timing& timing) {
    ImportanceShape shape;
    shape.num_rows = timing.rows;
    shape.num_query_heads = timing.query_heads;
    shape.num_kv_heads = timing.kv_heads;
    shape.dim = 128;
    shape.num_windows = (timing.tokens - timing.window_tokens) / timing.stride_tokens + 1;
    shape.max_k = 16;
    shape.query_dtype = DataType::kBFloat16;
    shape.window_tokens = timing.window_tokens;
    shape.stride_tokens = timing.stride_tokens;
    shape.block_tokens = 64;
    return shape;
  }
  int64_t num_pages() const { return (shape_.num_windows + kPageTokens - 1) / kPageTokens; }
  size_t page_elements() const {
    return static_cast<size_t>(2 * shape_.num_kv_heads * kPageTokens * shape_.dim);
  }

  // Causal: a row sees the windows that end at or before it, and the blocks before its own.
  void make_rows() {
    std::vector<int64_t> offsets = {0};
    std::vector<Span> spans;
    std::vector<int64_t> end;
    for (int64_t row = 0; row < timing_.rows; ++row) {
      const int64_t position = timing_.tokens - timing_.rows + row;
      const int64_t seen = position + 1;
      host_visible_.push_back(seen < timing_.window_tokens
                                  ? 0
                                  : (seen - timing_.window_tokens) / timing_.stride_tokens + 1);
      end.push_back(position / 64);
      if (host_visible_.back() > 0) {
        spans.push_back({0, host_visible_.back()});
      }
      offsets.push_back(static_cast<int64_t>(spans.size()));
    }
    spans.push_back({0, 0});  // never empty
    visible_ = std::make_unique<Device<int64_t>>(host_visible_);
    end_ = std::make_unique<Device<int64_t>>(end);
    host_end_ = end;
    begin_ = std::make_unique<Device<int64_t>>(std::vector<int64_t>(end.size(), 0));
    k_ = std::make_unique<Device<int64_t>>(std::vector<int64_t>(end.size(), shape_.max_k));
    offsets_ = std::make_unique<Device<int64_t>>(offsets);
    spans_ = std::make_unique<Device<Span>>(spans);
  }

  void make_args(const DeviceInfo& device) {
    const float scale = 0.5F;  // logits of a few units, as trained models have them
    args_.shape = shape_;
    args_.query = query_.data();
    args_.pages = pages_->data();
    args_.lse = lse_.data();
    args_.scale = scale;
    args_.visible_windows = visible_->data();
    args_.candidate_begin = begin_->data();
    args_.candidate_end = end_->data();
    args_.k = k_->data();
    args_.scores = scores_.data();
    args_.ids = ids_.data();

    AttendParams& params = attend_.params;
    params.query = reinterpret_cast<const float*>(query_.data());
    params.query_dtype = DataType::kBFloat16;
    params.num_rows = timing_.rows;
    params.num_query_heads = timing_.query_heads;
    params.kv.pages = pages_->data();
    params.kv.num_entries = shape_.num_windows;
    params.kv.dtype = DataType::kBFloat16;
    params.kv.num_kv_heads = timing_.kv_heads;
    params.kv.key_dim = shape_.dim;
    params.kv.value_dim = shape_.dim;
    params.kv.arena = reinterpret_cast<const std::byte*>(arena_.data());
    params.kv.arena_bytes = arena_.size() * 2;
    params.span_offsets = offsets_->data();
    params.spans = spans_->data();
    params.scale = scale;
    params.out = reinterpret_cast<float*>(out_.data());
    params.out_dtype = DataType::kBFloat16;
    params.lse = lse_.data();
    const int group = timing_.query_heads / timing_.kv_heads;
    attend_.tile_rows = attend_tile_rows({shape_.dim, shape_.dim, group, 1}, timing_.rows * group);
    attend_.num_sms = device.num_sms;
    attend_.section_heads =
        section_heads(timing_.kv_heads, shape_.num_windows * shape_.dim * 4, device);
    scratch_ = std::make_unique<Device<int32_t>>(static_cast<size_t>(attend_tiles_scratch(params)));
    attend_.scratch = scratch_->data();
  }

  bool check_lists(int64_t row,
                   const std::vector<double>& probabilities,  // [H][n]
                   const std::vector<float>& scores,
                   const std::vector<int64_t>& ids) const {
    const int64_t visible = host_visible_[static_cast<size_t>(row)];
    const int64_t num_blocks = host_end_[static_cast<size_t>(row)];
    for (int kv_head = 0; kv_head < timing_.kv_heads; ++kv_head) {
      std::vector<double> all(static_cast<size_t>(num_blocks), 0.0);
      for (int head = kv_head * shape_.group(); head < (kv_head + 1) * shape_.group(); ++head) {
        for (int64_t window = 0; window < visible; ++window) {
          const int64_t begin = window * shape_.stride_tokens;
          for (int64_t block = begin / 64;
               block <= (begin + shape_.window_tokens - 1) / 64 && block < num_blocks;
               ++block) {
            const int64_t overlap = std::min(begin + shape_.window_tokens, block * 64 + 64) -
                                    std::max(begin, block * 64);
            all[static_cast<size_t>(block)] +=
                static_cast<double>(overlap) / shape_.stride_tokens *
                probabilities[static_cast<size_t>(head * shape_.num_windows + window)];
          }
        }
      }
      std::vector<double> ranking = all;
      std::sort(ranking.begin(), ranking.end(), std::greater<>());
      const auto first = static_cast<size_t>((row * timing_.kv_heads + kv_head) * shape_.max_k);
      for (int64_t place = 0; place < std::min(shape_.max_k, num_blocks); ++place) {
        const auto i = first + static_cast<size_t>(place);
        const double expected = ranking[static_cast<size_t>(place)];
        const bool known = ids[i] >= 0 && ids[i] < num_blocks;
        // The log-sum-exp is that of the attention, not exact.
        if (!known || !(std::abs(static_cast<double>(scores[i]) - expected) <= 1e-3 * expected) ||
            !(std::abs(all[static_cast<size_t>(ids[i])] - expected) <= 1e-3 * expected)) {
          std::printf("  row %lld KV head %d place %lld: block %lld score %.9g, expected %.9g\n",
                      static_cast<long long>(row),
                      kv_head,
                      static_cast<long long>(place),
                      static_cast<long long>(ids[i]),
                      static_cast<double>(scores[i]),
                      expected);
          return false;
        }
      }
    }
    return true;
  }

  Timing timing_;
  ImportanceShape shape_;
  ImportancePlan plan_;
  Device<__nv_bfloat16> arena_;
  Device<__nv_bfloat16> query_;
  Device<__nv_bfloat16> out_;
  Device<float> lse_;
  Device<float> scores_;
  Device<int64_t> ids_;
  Device<std::byte> workspace_;
  Device<uint32_t> tickets_;
  std::unique_ptr<Device<const std::byte*>> pages_;
  std::unique_ptr<Device<int64_t>> visible_, begin_, end_, k_, offsets_;
  std::unique_ptr<Device<Span>> spans_;
  std::unique_ptr<Device<int32_t>> scratch_;
  std::vector<int64_t> host_visible_, host_end_;
  ImportanceArgs args_;
  AttendTilesArgs attend_;
};

void report(const BenchOptions& options,
            const std::string& name,
            const Samples& time,
            double flop,
            double bytes,
            bool right) {
  const double floor = std::max(flop / kPeakTeraflops * 1e-9, bytes / kPeakGigabytes * 1e-6);
  std::printf("%s %-48s %8.4f ms (%.4f to %.4f); %.0f TFLOP/s, %.2f of the floor\n",
              right ? "TIME" : "FAIL",
              name.c_str(),
              time.median,
              time.least,
              time.most,
              flop / time.median * 1e-9,
              floor / time.median);
  std::fflush(stdout);
  append_json(options.json, "cuda_importance", name, time, flop, bytes, floor, right);
}

// Returns false if a result is wrong.
bool run_timing(const Timing& timing, const DeviceInfo& device, const BenchOptions& options) {
  if (case_name("importance", timing).find(options.only) == std::string::npos) {
    return true;
  }
  const Problem problem(timing, device);
  if (problem.plan().declined != nullptr) {
    std::printf("FAIL %s: declined\n", case_name("importance", timing).c_str());
    return false;
  }
  problem.attend(nullptr);
  problem.search(nullptr);
  CHECK_CUDA(cudaDeviceSynchronize());
  const bool right = problem.verify();
  const double flop = 2 * problem.pairs();
  const double bytes = problem.query_bytes() + problem.key_bytes();
  const int repeats = timing.rows == 1 ? 60 : 9;
  const Samples attend = sample(repeats, [&](cudaStream_t stream) { problem.attend(stream); });
  const Samples search = sample(repeats, [&](cudaStream_t stream) { problem.search(stream); });
  const Samples both = sample(repeats, [&](cudaStream_t stream) {
    problem.attend(stream);
    problem.search(stream);
  });
  report(options, case_name("compressed attention", timing), attend, 2 * flop, 2 * bytes, right);
  report(options, case_name("importance top-16", timing), search, flop, bytes, right);
  report(options,
         case_name("compressed and importance top-16", timing),
         both,
         3 * flop,
         3 * bytes,
         right);
  return right;
}

int run_times(const DeviceInfo& device, const BenchOptions& options) {
  int failures = 0;
  constexpr int64_t kK = 1024;
  for (const Timing& timing : {Timing{64, 4, 32 * kK, 32, 16, 32 * kK},
                               Timing{64, 4, 64 * kK, 32, 16, 64 * kK},
                               Timing{64, 4, 64 * kK, 64, 64, 64 * kK},
                               Timing{32, 8, 64 * kK, 32, 16, 64 * kK},
                               Timing{32, 8, 64 * kK, 64, 64, 64 * kK},
                               Timing{64, 4, 1024 * kK, 32, 16, 1},
                               Timing{32, 8, 1024 * kK, 32, 16, 1}}) {
    failures += run_timing(timing, device, options) ? 0 : 1;
  }
  return failures;
}

}  // namespace
}  // namespace longspan::cuda

int main(int argc, char** argv) {
  using namespace longspan::cuda;
  const BenchOptions options = parse_options(argc, argv);
  const DeviceInfo device = open_device(options.seed);
  int failures = run_checks(device, options);
  if (!options.quick) {
    failures += run_times(device, options);
  }
  return failures == 0 ? 0 : 1;
}
