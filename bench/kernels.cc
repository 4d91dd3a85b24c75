// The simd backend against the reference, stage by stage: each result is checked before it is
// timed.
//
//   kernels [--quick] [--threads N] [--long] [--json FILE]
//
// --quick keeps to small contexts; --long adds those of 2^20 tokens. A line of JSON for each case
// goes to FILE. The reference is timed on a few rows and scaled to all of them by their work.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/checked.h"
#include "base/device.h"
#include "bench/machine.h"
#include "kernels/backend.h"

namespace longspan::bench {
namespace {

struct Options {
  bool quick = false;
  bool with_long = false;
  int num_threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  std::string json_path;
};

struct Shape {
  const char* name;
  int num_query_heads;
  int num_kv_heads;
  int dim;
};
constexpr Shape kShapes[] = {{"9/3 d64", 9, 3, 64}, {"32/8 d128", 32, 8, 128}};
constexpr int kBlockTokens = 64;
constexpr int64_t kTopBlocks = 32;

// Pages of random bf16, about normal.
class Pages {
 public:
  Pages(int num_kv_heads, int key_dim, int value_dim, int64_t num_entries) {
    view_.num_entries = num_entries;
    view_.dtype = DataType::kBFloat16;
    view_.num_kv_heads = num_kv_heads;
    view_.key_dim = key_dim;
    view_.value_dim = value_dim;
    const int64_t num_pages = divide_up(num_entries, kPageTokens);
    auto memory = Buffer::allocate(static_cast<size_t>(num_pages) * view_.page_bytes());
    LONGSPAN_CHECK(memory.ok());
    memory_ = *std::move(memory);
    uint64_t state = 88172645463325252ULL + static_cast<uint64_t>(num_entries);
    auto* elements = reinterpret_cast<uint16_t*>(memory_.data());
    for (size_t i = 0; i < memory_.size() / 2; ++i) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      // The sum of four bytes: mean 510, deviation 147.8.
      const auto sum = static_cast<float>((state & 0xff) + ((state >> 8) & 0xff) +
                                          ((state >> 16) & 0xff) + ((state >> 24) & 0xff));
      elements[i] = float_to_bfloat16((sum - 510.0F) / 147.8F);
    }
    for (int64_t page = 0; page < num_pages; ++page) {
      pages_.push_back(memory_.data() + static_cast<size_t>(page) * view_.page_bytes());
    }
    view_.pages = pages_.data();
  }
  const PagedView& view() const { return view_; }

 private:
  Buffer memory_;
  std::vector<const std::byte*> pages_;
  PagedView view_;
};

std::vector<float> random_queries(size_t count) {
  std::mt19937 engine(7);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) {
    value = bfloat16_to_float(float_to_bfloat16(normal(engine)));  // as a bf16 model sends them
  }
  return values;
}

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options) {
    auto simd = make_backend("simd", {.num_threads = options.num_threads});
    auto reference = make_backend("reference", {.num_threads = 1});
    LONGSPAN_CHECK(simd.ok() && reference.ok());
    simd_ = *std::move(simd);
    reference_ = *std::move(reference);
    copy_rate_ = copy_rate(options.num_threads, options.quick ? size_t{1} << 26 : size_t{1} << 30);
    std::printf("%s, %s, copy %.1f GB/s\n\n",
                processor_name().c_str(),
                simd_->detail().c_str(),
                copy_rate_ / 1e9);
    std::printf("%-34s %10s %9s %9s %7s %11s %9s\n",
                "case",
                "time",
                "GB/s",
                "GFLOP/s",
                "of copy",
                "reference x",
                "error");
  }

  int run() {
    for (const Shape& shape : kShapes) {
      const std::vector<int64_t> contexts = options_.quick ? std::vector<int64_t>{4096}
                                            : options_.with_long
                                                ? std::vector<int64_t>{1 << 17, 1 << 20}
                                                : std::vector<int64_t>{1 << 17};
      for (const int64_t num_tokens : contexts) {
        const Pages kv(shape.num_kv_heads, shape.dim, shape.dim, num_tokens);
        dense_decode(shape, kv.view());
        sparse_decode(shape, kv.view());
      }
      for (const int64_t num_tokens :
           options_.quick ? std::vector<int64_t>{300} : std::vector<int64_t>{4096, 8192}) {
        const Pages kv(shape.num_kv_heads, shape.dim, shape.dim, num_tokens);
        dense_prefill(shape, kv.view());
      }
    }
    return failed_ ? 1 : 0;
  }

 private:
  struct Work {
    double bytes = 0;
    double flops = 0;
  };

  // One timed line. `fraction` is the part of the work that the reference was timed on.
  void report(const std::string& name,
              double seconds,
              Work work,
              double reference_seconds,
              double fraction,
              double error,
              double limit) {
    const double speedup = reference_seconds / fraction / seconds;
    const bool wrong = !(error <= limit);
    failed_ = failed_ || wrong;
    std::printf("%-34s %8.3fms %9.2f %9.1f %6.0f%% %10.0fx %9.1e%s\n",
                name.c_str(),
                seconds * 1e3,
                work.bytes / seconds / 1e9,
                work.flops / seconds / 1e9,
                100 * work.bytes / seconds / copy_rate_,
                speedup,
                error,
                wrong ? " WRONG" : "");
    std::fflush(stdout);
    Record record;
    record.add("case", name)
        .add("machine", processor_name())
        .add("backend", simd_->detail())
        .add("seconds", seconds)
        .add("bytes", work.bytes)
        .add("flops", work.flops)
        .add("copy_bytes_per_second", copy_rate_)
        .add("fraction_of_copy", work.bytes / seconds / copy_rate_)
        .add("reference_seconds", reference_seconds / fraction)
        .add("speedup_over_reference", speedup)
        .add("error", error);
    if (!options_.json_path.empty()) {
      std::ofstream(options_.json_path, std::ios::app) << record.json() << "\n";
    }
  }

  static double relative_error(const float* actual, const float* expected, size_t count) {
    double error = 0;
    double length = 0;
    for (size_t i = 0; i < count; ++i) {
      error += std::pow(double{actual[i]} - expected[i], 2);
      length += std::pow(double{expected[i]}, 2);
    }
    return std::sqrt(error / length);
  }

  static double once(const std::function<void()>& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void attend(Backend& backend, const AttendParams& params) {
    LONGSPAN_CHECK(backend.attend(params, stream_).ok());
  }
  void search(Backend& backend, const SearchParams& params) {
    LONGSPAN_CHECK(backend.search(params, stream_).ok());
  }

  // All rows on simd, the last `num_checked` of them on the reference; the rows' spans are given.
  void time_attend(const std::string& name,
                   AttendParams params,
                   int64_t num_checked,
                   Work work,
                   double checked_fraction) {
    const auto lanes = static_cast<size_t>(params.num_rows * params.num_query_heads);
    const auto dim = static_cast<size_t>(params.kv.value_dim);
    std::vector<float> out(lanes * dim);
    std::vector<float> lse(lanes);
    params.out = out.data();
    params.lse = lse.data();
    const double seconds =
        median_seconds(options_.quick ? 0.05 : 2.0, [&] { attend(*simd_, params); });

    const int64_t skipped = params.num_rows - num_checked;
    const auto checked_lanes = static_cast<size_t>(num_checked * params.num_query_heads);
    std::vector<float> expected(checked_lanes * dim);
    std::vector<float> expected_lse(checked_lanes);
    AttendParams checked = params;
    checked.query += skipped * params.num_query_heads * params.kv.key_dim;
    checked.num_rows = num_checked;
    checked.span_offsets += skipped * params.num_selection_heads;
    checked.out = expected.data();
    checked.lse = expected_lse.data();
    const double reference_seconds = once([&] { attend(*reference_, checked); });
    const double error =
        relative_error(out.data() + out.size() - expected.size(), expected.data(), expected.size());
    report(name, seconds, work, reference_seconds, checked_fraction, error, 4e-3);
  }

  void dense_decode(const Shape& shape, const PagedView& kv) {
    const std::vector<float> query =
        random_queries(static_cast<size_t>(shape.num_query_heads) * static_cast<size_t>(shape.dim));
    const Span span{0, kv.num_entries};
    const int64_t offsets[] = {0, 1};
    AttendParams params = attend_params(shape, kv, query);
    params.num_rows = 1;
    params.span_offsets = offsets;
    params.spans = &span;
    const auto tokens = static_cast<double>(kv.num_entries);
    const Work work{tokens * 4 * shape.num_kv_heads * shape.dim,
                    tokens * 4 * shape.num_query_heads * shape.dim};
    time_attend(label("dense decode", shape, kv.num_entries), params, 1, work, 1.0);
  }

  void dense_prefill(const Shape& shape, const PagedView& kv) {
    const int64_t rows = kv.num_entries;
    const std::vector<float> query = random_queries(
        static_cast<size_t>(rows * shape.num_query_heads) * static_cast<size_t>(shape.dim));
    std::vector<Span> spans;
    for (int64_t row = 0; row < rows; ++row) {
      spans.push_back({0, row + 1});
    }
    std::vector<int64_t> offsets(static_cast<size_t>(rows) + 1);
    std::iota(offsets.begin(), offsets.end(), 0);
    AttendParams params = attend_params(shape, kv, query);
    params.num_rows = rows;
    params.span_offsets = offsets.data();
    params.spans = spans.data();
    const double pairs = static_cast<double>(rows) * static_cast<double>(rows + 1) / 2;
    const int64_t checked = 2;
    const Work work{static_cast<double>(rows) * 4 * shape.num_kv_heads * shape.dim,
                    pairs * 4 * shape.num_query_heads * shape.dim};
    time_attend(label("dense prefill", shape, rows),
                params,
                checked,
                work,
                static_cast<double>(checked * rows - 1) / pairs);
  }

  // Mean summaries of blocks, the best 32 for each KV head by the group's sum, attention to them.
  void sparse_decode(const Shape& shape, const PagedView& kv) {
    SummarySpec summary;
    summary.kind = SummaryKind::kMean;
    summary.block_tokens = kBlockTokens;
    const int64_t num_blocks = summary.num_entries(kv.num_entries);
    const Pages means(shape.num_kv_heads, shape.dim, 0, num_blocks);
    time_summarize(shape, kv, summary, means.view());

    const std::vector<float> query =
        random_queries(static_cast<size_t>(shape.num_query_heads) * static_cast<size_t>(shape.dim));
    SearchSpec spec;
    spec.head_reduce = HeadReduce::kGroupSum;
    const int64_t begin = 0;
    const int64_t k = std::min(kTopBlocks, num_blocks);
    const auto places = static_cast<size_t>(shape.num_kv_heads * k);
    std::vector<float> scores(places);
    std::vector<int64_t> ids(places);
    SearchParams params;
    params.spec = &spec;
    params.query = query.data();
    params.num_rows = 1;
    params.num_query_heads = shape.num_query_heads;
    params.view = means.view();
    params.candidate_begin = &begin;
    params.candidate_end = &num_blocks;
    params.k = &k;
    params.max_k = k;
    params.scores = scores.data();
    params.ids = ids.data();
    const double seconds =
        median_seconds(options_.quick ? 0.05 : 1.0, [&] { search(*simd_, params); });
    std::vector<float> expected(places);
    std::vector<int64_t> expected_ids(places);
    SearchParams checked = params;
    checked.scores = expected.data();
    checked.ids = expected_ids.data();
    const double reference_seconds = once([&] { search(*reference_, checked); });
    const auto blocks = static_cast<double>(num_blocks);
    report(label("search mean-64 top-32", shape, kv.num_entries),
           seconds,
           {blocks * 2 * shape.num_kv_heads * shape.dim,
            blocks * 2 * shape.num_query_heads * shape.dim},
           reference_seconds,
           1.0,
           relative_error(scores.data(), expected.data(), places),
           1e-5);
    attend_selected(shape, kv, query, ids, k);
  }

  void attend_selected(const Shape& shape,
                       const PagedView& kv,
                       const std::vector<float>& query,
                       std::vector<int64_t> ids,
                       int64_t k) {
    std::vector<Span> spans;
    std::vector<int64_t> offsets{0};
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      std::sort(ids.begin() + head * k, ids.begin() + (head + 1) * k);
      for (int64_t place = head * k; place < (head + 1) * k; ++place) {
        const int64_t block = ids[static_cast<size_t>(place)];
        spans.push_back({block * kBlockTokens, (block + 1) * kBlockTokens});
      }
      offsets.push_back(static_cast<int64_t>(spans.size()));
    }
    AttendParams params = attend_params(shape, kv, query);
    params.num_rows = 1;
    params.num_selection_heads = shape.num_kv_heads;
    params.span_offsets = offsets.data();
    params.spans = spans.data();
    const auto tokens = static_cast<double>(k * kBlockTokens);
    time_attend(label("attend 32 blocks", shape, kv.num_entries),
                params,
                1,
                {tokens * 4 * shape.num_kv_heads * shape.dim,
                 tokens * 4 * shape.num_query_heads * shape.dim},
                1.0);
  }

  void time_summarize(const Shape& shape,
                      const PagedView& kv,
                      const SummarySpec& summary,
                      const PagedView& out) {
    SummarizeParams params;
    params.spec = &summary;
    params.tokens = kv;
    params.num_entries = out.num_entries;
    params.out = out;
    const double seconds = median_seconds(options_.quick ? 0.05 : 1.0, [&] {
      LONGSPAN_CHECK(simd_->summarize(params, stream_).ok());
    });
    const Pages expected(shape.num_kv_heads, shape.dim, 0, out.num_entries);
    SummarizeParams checked = params;
    checked.out = expected.view();
    checked.num_entries = std::min<int64_t>(params.num_entries, 64);
    const double reference_seconds =
        once([&] { LONGSPAN_CHECK(reference_->summarize(checked, stream_).ok()); });
    bool equal = true;
    for (int64_t entry = 0; entry < checked.num_entries; ++entry) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        equal = equal && std::memcmp(out.key(entry, head),
                                     expected.view().key(entry, head),
                                     static_cast<size_t>(shape.dim) * 2) == 0;
      }
    }
    report(label("summarize mean-64", shape, kv.num_entries),
           seconds,
           {static_cast<double>(kv.num_entries) * 2 * shape.num_kv_heads * shape.dim, 0},
           reference_seconds,
           static_cast<double>(checked.num_entries) / static_cast<double>(params.num_entries),
           equal ? 0.0 : 1.0,
           0.0);
  }

  static AttendParams attend_params(const Shape& shape,
                                    const PagedView& kv,
                                    const std::vector<float>& query) {
    AttendParams params;
    params.query = query.data();
    params.num_query_heads = shape.num_query_heads;
    params.kv = kv;
    params.scale = 1.0F / std::sqrt(static_cast<float>(shape.dim));
    return params;
  }

  static std::string label(const std::string& what, const Shape& shape, int64_t num_tokens) {
    return what + " " + shape.name + " " +
           (num_tokens % 1024 == 0 ? std::to_string(num_tokens / 1024) + "K"
                                   : std::to_string(num_tokens));
  }

  const Options& options_;
  std::unique_ptr<Backend> simd_;
  std::unique_ptr<Backend> reference_;
  Stream stream_;
  double copy_rate_ = 0;
  bool failed_ = false;
};

bool parse(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--long") {
      options.with_long = true;
    } else if (argument == "--threads" && i + 1 < argc) {
      options.num_threads = std::max(1, std::atoi(argv[++i]));
    } else if (argument == "--json" && i + 1 < argc) {
      options.json_path = argv[++i];
    } else {
      std::fprintf(stderr, "usage: kernels [--quick] [--long] [--threads N] [--json FILE]\n");
      return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace longspan::bench

int main(int argc, char** argv) {
  longspan::bench::Options options;
  if (!longspan::bench::parse(argc, argv, options)) {
    return 2;
  }
  return longspan::bench::Bench(options).run();
}
