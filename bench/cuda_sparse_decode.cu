// Checks and times the sparse decode step of kernels/cuda (sparse_decode.h) on one GPU, alone: no
// other library of ours. Checks first, against two steps in double precision. Then times inside a
// graph of many steps, on inputs that L2 does not hold, beside the time that their bytes take.
//
//   cuda_sparse_decode [--quick] [--seed N] [--only TEXT] [--json FILE]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "bench/cuda_sparse_cases.h"
#include "bench/cuda_support.h"
#include "kernels/cuda/sparse_decode.h"

namespace longspan::cuda {
namespace {

int run_checks(const DeviceInfo& device, uint64_t seed, const std::string& only) {
  const std::vector<SparseCase> cases = all_sparse_cases();
  int failures = 0;
  int run = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    SparseCase c = cases[i];
    std::mt19937_64 random(seed + i);
    if (describe(c).find(only) != std::string::npos) {
      ++run;
      failures += run_sparse_case(c, device, random) ? 0 : 1;
    }
  }
  std::printf("%s: %d of %d checks failed\n", failures == 0 ? "OK" : "FAILED", failures, run);
  return failures;
}

struct TimedCase {
  const char* size;
  int query_heads;
  int kv_heads;
  int64_t num_tokens;
  int64_t k;
  bool attends;
  int max_cluster_size = kSparseMaxCluster;
  bool all_pages =
      true;  // the context's pages all lie in memory; otherwise some of them, again and again
};

// bf16, d 128; several copies of the summaries and queries in turn.
class TimedInputs {
 public:
  explicit TimedInputs(const TimedCase& timed)
      : num_entries_(timed.num_tokens / kPageTokens),
        summary_elements_(static_cast<size_t>(timed.kv_heads) * kPageTokens * kDim),
        num_summary_pages_(static_cast<size_t>((num_entries_ + kPageTokens - 1) / kPageTokens)),
        copies_(std::clamp<size_t>(
            (size_t{170} << 20) / (2 * num_summary_pages_ * summary_elements_) + 1, 1, 20)),
        summaries_(summary_elements_ * num_summary_pages_ * copies_),
        places_(static_cast<size_t>(timed.all_pages ? num_entries_ : 4096)),
        context_(2 * summary_elements_ * (timed.attends ? places_ : 1)),
        query_(static_cast<size_t>(timed.query_heads) * kDim * kQueries),
        out_(static_cast<size_t>(timed.query_heads) * kDim),
        lse_(static_cast<size_t>(timed.query_heads)),
        scores_(static_cast<size_t>(timed.kv_heads * timed.k)),
        ids_(static_cast<size_t>(timed.kv_heads * timed.k)),
        summary_pages_(summary_table()),
        pages_(page_table(timed.attends)),
        zero_(std::vector<int64_t>{0}),
        end_(std::vector<int64_t>{num_entries_ - 1}),
        k_(std::vector<int64_t>{timed.k}),
        num_tokens_(std::vector<int64_t>{timed.num_tokens}) {
    longspan::cuda::fill(summaries_.data(), summaries_.size(), 1);
    longspan::cuda::fill(context_.data(), context_.size(), 2);
    longspan::cuda::fill(query_.data(), query_.size(), 3);
  }

  // Of call `i`.
  SparseDecodeArgs args(const SparseShape& shape, int i) const {
    const auto query = query_.data() + static_cast<size_t>(i) % kQueries *
                                           static_cast<size_t>(shape.search.num_query_heads) * kDim;
    SparseDecodeArgs args;
    args.shape = shape;
    args.search.shape = shape.search;
    args.search.query = query;
    args.search.pages =
        summary_pages_.data() + static_cast<size_t>(i) % copies_ * num_summary_pages_;
    args.search.candidate_begin = zero_.data();
    args.search.candidate_end = end_.data();
    args.search.k = k_.data();
    args.search.scores = shape.attends ? nullptr : scores_.data();
    args.search.ids = shape.attends ? nullptr : ids_.data();
    args.query = query;
    args.kv.pages = pages_.data();
    args.kv.num_entries = num_entries_ * kPageTokens;
    args.kv.num_kv_heads = shape.search.num_kv_heads;
    args.kv.key_dim = kDim;
    args.kv.value_dim = kDim;
    args.kv.arena = reinterpret_cast<const std::byte*>(context_.data());
    args.kv.arena_bytes = context_.size() * 2;
    args.num_tokens = num_tokens_.data();
    args.scale = 1.0F / std::sqrt(static_cast<float>(kDim));
    args.out = out_.data();
    args.out_dtype = DataType::kBFloat16;
    args.lse = lse_.data();
    return args;
  }

  static constexpr int kDim = 128;

 private:
  static constexpr size_t kQueries = 20;

  std::vector<const std::byte*> summary_table() const {
    std::vector<const std::byte*> pages;
    for (size_t i = 0; i < num_summary_pages_ * copies_; ++i) {
      pages.push_back(
          reinterpret_cast<const std::byte*>(summaries_.data() + i * summary_elements_));
    }
    return pages;
  }
  std::vector<const std::byte*> page_table(bool attends) const {
    std::vector<const std::byte*> pages;
    for (size_t i = 0; i < static_cast<size_t>(num_entries_); ++i) {
      pages.push_back(reinterpret_cast<const std::byte*>(
          context_.data() + (attends ? i * 2654435761U % places_ : 0) * 2 * summary_elements_));
    }
    return pages;
  }

  int64_t num_entries_;
  size_t summary_elements_;  // of a page
  size_t num_summary_pages_;
  size_t copies_;
  Device<__nv_bfloat16> summaries_;
  size_t places_;
  Device<__nv_bfloat16> context_;
  Device<__nv_bfloat16> query_, out_;
  Device<float> lse_, scores_;
  Device<int64_t> ids_;
  Device<const std::byte*> summary_pages_, pages_;
  Device<int64_t> zero_, end_, k_, num_tokens_;
};

void time_step(const TimedCase& timed, const DeviceInfo& device, const std::string& json) {
  SparseShape shape;
  shape.search.num_rows = 1;
  shape.search.num_query_heads = timed.query_heads;
  shape.search.num_kv_heads = timed.kv_heads;
  shape.search.dim = TimedInputs::kDim;
  shape.search.num_entries = timed.num_tokens / kPageTokens;
  shape.search.max_k = timed.k;
  shape.search.query_dtype = DataType::kBFloat16;
  shape.search.query_form = QueryForm::kGroupMean;
  shape.attends = timed.attends;
  shape.attention_query_dtype = DataType::kBFloat16;
  char name[128];
  std::snprintf(name,
                sizeof(name),
                "%s decode %d/%d d128 %s top-%lld",
                timed.attends ? "sparse" : "cluster search",
                timed.query_heads,
                timed.kv_heads,
                timed.size,
                static_cast<long long>(timed.k));
  const SparsePlan plan = plan_sparse_decode(shape, device, timed.max_cluster_size);
  if (!plan.supported) {
    std::printf("TIME %s: not supported\n", name);
    return;
  }
  const TimedInputs inputs(timed);
  const Times times = time_calls(
      [&](int i, cudaStream_t stream) {
        CHECK_CUDA(launch_sparse_decode(inputs.args(shape, i), plan, stream));
      },
      160);
  const double row_bytes = 2.0 * TimedInputs::kDim * timed.kv_heads;
  const double summary_bytes = row_bytes * static_cast<double>(shape.search.num_entries);
  // The query's own block beside the selected ones.
  const double context_bytes =
      timed.attends ? 2 * row_bytes * kPageTokens * static_cast<double>(timed.k + 1) : 0.0;
  const double bytes = summary_bytes + context_bytes;
  const double floor = bytes / (kPeakGigabytes * 1e6);
  std::printf(
      "TIME %s, clusters of %d, %d stages: single %.2f us, in a graph %.2f us (%.2f to %.2f); "
      "%.1f MB, floor %.2f us, %.2f of it\n",
      name,
      plan.cluster_size,
      plan.num_stages,
      times.single * 1e3,
      times.in_graph * 1e3,
      times.least * 1e3,
      times.most * 1e3,
      bytes * 1e-6,
      floor * 1e3,
      floor / times.in_graph);
  std::fflush(stdout);
  if (timed.max_cluster_size == kSparseMaxCluster) {
    append_json(json,
                "cuda_sparse_decode",
                name,
                {times.in_graph, times.least, times.most},
                /*flop=*/0,
                bytes,
                floor,
                /*right=*/true);
  }
}

void run_times(const DeviceInfo& device, const std::string& json) {
  struct Heads {
    int query;
    int kv;
  };
  constexpr int64_t kMillion = int64_t{1} << 20;
  for (const Heads heads : {Heads{32, 8}, Heads{64, 4}}) {
    for (const bool attends : {true, false}) {
      for (const int64_t k : {16, 64, 256}) {
        time_step({"1M", heads.query, heads.kv, kMillion, k, attends}, device, json);
      }
      time_step({"128K", heads.query, heads.kv, kMillion / 8, 64, attends}, device, json);
    }
    // The choice that was made, beside another.
    TimedCase other = {"1M", heads.query, heads.kv, kMillion, 64, true};
    other.max_cluster_size = 8;
    time_step(other, device, json);
    TimedCase long_context = {"10M", heads.query, heads.kv, 10 * kMillion, 64, true};
    long_context.all_pages = false;
    time_step(long_context, device, json);
  }
}

}  // namespace
}  // namespace longspan::cuda

int main(int argc, char** argv) {
  using namespace longspan::cuda;
  const BenchOptions options = parse_options(argc, argv);
  const DeviceInfo device = open_device(options.seed);
  std::printf("clusters of up to %d\n", sparse_max_cluster_size());
  const int failures = run_checks(device, options.seed, options.only);
  if (!options.quick && failures == 0) {
    run_times(device, options.json);
  }
  return failures == 0 ? 0 : 1;
}
