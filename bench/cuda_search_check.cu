// One case of the search: inputs, the reference on the device, and the comparison.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>

#include <cuda_runtime.h>

#include "bench/cuda_search_cases.h"
#include "bench/cuda_support.h"
#include "kernels/cuda/convert.h"
#include "kernels/cuda/search_topk.h"
#include "kernels/page.h"

namespace longspan::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One thread a score: list `s` of row `t` at one entry, in double, as kernels/reference has it, and
// the sum of the sizes of its products, by which rounding errors are judged.
struct ReferenceArgs {
  SearchTopkArgs search;
  Reductions reductions;
  double* scores;      // [T][S][n]
  double* magnitudes;  // [T][S][n]
};

__device__ double reference_query(const ReferenceArgs& args, int64_t row, int head, int d) {
  const SearchShape& shape = args.search.shape;
  const int group = shape.num_query_heads / shape.num_kv_heads;
  int first = head;
  int count = 1;
  if (args.reductions.query == QueryReduce::kGroupMean) {
    first = head * group;
    count = group;
  } else if (args.reductions.query == QueryReduce::kAllMean) {
    first = 0;
    count = shape.num_query_heads;
  }
  double mean = 0;
  for (int h = first; h < first + count; ++h) {
    const int64_t index = (row * shape.num_query_heads + h) * shape.dim + d;
    mean += static_cast<double>(
                load_as_float(shape.query_dtype, args.search.query, static_cast<size_t>(index))) /
            count;
  }
  return mean;
}

__device__ void reference_score(const ReferenceArgs& args,
                                int64_t row,
                                int list,
                                int num_lists,
                                int64_t entry,
                                double& score,
                                double& magnitude) {
  const SearchShape& shape = args.search.shape;
  const int group = shape.num_query_heads / shape.num_kv_heads;
  const bool reduced = args.reductions.query != QueryReduce::kNone;
  const int heads = reduced ? shape.num_kv_heads : shape.num_query_heads;
  const int per_list = heads / num_lists;
  const HeadReduce head_reduce = args.reductions.head;
  const bool maximum = head_reduce == HeadReduce::kGroupMax || head_reduce == HeadReduce::kAllMax;
  const bool mean = head_reduce == HeadReduce::kGroupMean || head_reduce == HeadReduce::kAllMean;
  double joined = maximum ? -INFINITY : 0.0;
  magnitude = 0;
  for (int head = list * per_list; head < (list + 1) * per_list; ++head) {
    const int kv_head = reduced ? head : head / group;
    const std::byte* page = args.search.pages[entry / kPageTokens];
    double sum = 0;
    for (int d = 0; d < shape.dim; ++d) {
      const double query = reference_query(args, row, head, d);
      const size_t element =
          (static_cast<size_t>(kv_head) * kPageTokens + static_cast<size_t>(entry % kPageTokens)) *
              static_cast<size_t>(shape.dim) +
          static_cast<size_t>(d);
      const double low = query * load_as_float(shape.dtype, page, element);
      double term = low;
      if (shape.score == ScoreForm::kBound) {
        const size_t plane =
            static_cast<size_t>(shape.num_kv_heads) * kPageTokens * static_cast<size_t>(shape.dim);
        const double high = query * load_as_float(shape.dtype, page, plane + element);
        term = low != low || high != high ? low + high : (low > high ? low : high);
      }
      sum += term;
      magnitude += fabs(term);
    }
    sum = sum != sum ? -INFINITY : sum;
    if (head_reduce == HeadReduce::kNone) {
      joined = sum;
    } else {
      joined = maximum ? (joined > sum ? joined : sum) : joined + sum;
    }
  }
  score = mean ? joined / per_list : joined;
  score = score != score ? -INFINITY : score;
  magnitude = mean ? magnitude / per_list : magnitude;
}

__global__ void reference_kernel(const ReferenceArgs args, int num_lists) {
  const SearchShape& shape = args.search.shape;
  const int64_t total = shape.num_rows * num_lists * shape.num_entries;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t entry = i % shape.num_entries;
    const int list = static_cast<int>(i / shape.num_entries % num_lists);
    const int64_t row = i / shape.num_entries / num_lists;
    if (entry < args.search.candidate_begin[row] || entry >= args.search.candidate_end[row]) {
      continue;
    }
    reference_score(args, row, list, num_lists, entry, args.scores[i], args.magnitudes[i]);
  }
}

// The inputs of a case, on the device. Pages lie in random order; what no entry fills is NaN.
class Inputs {
 public:
  Inputs(const Case& c, std::mt19937_64& random) : case_(c), random_(random) {
    make_query();
    make_pages();
    make_ranges();
  }

  SearchTopkArgs args() const {
    SearchTopkArgs args;
    args.shape = case_.shape;
    args.query = query_->data();
    args.pages = pages_->data();
    args.candidate_begin = begin_->data();
    args.candidate_end = end_->data();
    args.k = k_->data();
    return args;
  }
  const std::vector<int64_t>& begin() const { return host_begin_; }
  const std::vector<int64_t>& end() const { return host_end_; }
  const std::vector<int64_t>& k() const { return host_k_; }

 private:
  float number() {
    if (case_.numbers == Numbers::kNormal) {
      return std::normal_distribution<float>()(random_);
    }
    const bool zero = case_.numbers == Numbers::kFew && between(0, 9) != 0;
    return zero ? 0.0F : static_cast<float>(between(-2, 2));
  }
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  void make_query() {
    const SearchShape& shape = case_.shape;
    std::vector<float> values(
        static_cast<size_t>(shape.num_rows * shape.num_query_heads * shape.dim));
    for (float& value : values) {
      value = number();
    }
    query_ = std::make_unique<Device<std::byte>>(encode(shape.query_dtype, values));
  }

  void make_pages() {
    const SearchShape& shape = case_.shape;
    const int planes = shape.planes();
    const int64_t num_pages = (shape.num_entries + kPageTokens - 1) / kPageTokens;
    const auto plane_elements =
        static_cast<size_t>(shape.num_kv_heads) * kPageTokens * static_cast<size_t>(shape.dim);
    const size_t page_elements = plane_elements * static_cast<size_t>(planes);
    std::vector<float> values(page_elements * static_cast<size_t>(num_pages),
                              std::numeric_limits<float>::quiet_NaN());
    std::vector<int64_t> order(static_cast<size_t>(num_pages));
    for (size_t i = 0; i < order.size(); ++i) {
      order[i] = static_cast<int64_t>(i);
    }
    std::shuffle(order.begin(), order.end(), random_);
    for (int64_t entry = 0; entry < shape.num_entries; ++entry) {
      const auto page = static_cast<size_t>(order[static_cast<size_t>(entry / kPageTokens)]);
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        for (int d = 0; d < shape.dim; ++d) {
          const size_t i =
              page * page_elements +
              (static_cast<size_t>(head) * kPageTokens + static_cast<size_t>(entry % kPageTokens)) *
                  static_cast<size_t>(shape.dim) +
              static_cast<size_t>(d);
          float low = number();
          if (case_.numbers == Numbers::kSpecial && between(0, 999) == 0) {
            low = between(0, 2) == 0 ? std::numeric_limits<float>::quiet_NaN()
                                     : (between(0, 1) == 0 ? kInfinity : -kInfinity);
          }
          values[i] = low;
          if (planes == 2) {
            const float high = number();
            values[i] = high < low ? high : low;
            values[i + plane_elements] = high < low ? low : high;
          }
        }
      }
    }
    arena_ = std::make_unique<Device<std::byte>>(encode(shape.dtype, values));
    std::vector<const std::byte*> pages;
    for (const int64_t place : order) {
      pages.push_back(arena_->data() +
                      static_cast<size_t>(place) * page_elements * size_of(shape.dtype));
    }
    pages_ = std::make_unique<Device<const std::byte*>>(pages);
  }

  void make_ranges() {
    const SearchShape& shape = case_.shape;
    for (int64_t row = 0; row < shape.num_rows; ++row) {
      if (case_.causal) {
        host_begin_.push_back(row % 3 == 2 ? 1 : 0);
        host_end_.push_back(shape.num_entries * (row + 1) / shape.num_rows);
        host_begin_.back() = std::min(host_begin_.back(), host_end_.back());
        host_k_.push_back(shape.max_k);
        continue;
      }
      const int64_t end = between(0, 9) == 0 ? 0 : between(0, shape.num_entries);
      host_end_.push_back(row == 0 ? shape.num_entries : end);
      host_begin_.push_back(row == 0 ? 0 : between(0, end));
      host_k_.push_back(row == 0 ? shape.max_k : between(0, shape.max_k));
    }
    begin_ = std::make_unique<Device<int64_t>>(host_begin_);
    end_ = std::make_unique<Device<int64_t>>(host_end_);
    k_ = std::make_unique<Device<int64_t>>(host_k_);
  }

  const Case& case_;
  std::mt19937_64& random_;
  std::unique_ptr<Device<std::byte>> query_;
  std::unique_ptr<Device<std::byte>> arena_;
  std::unique_ptr<Device<const std::byte*>> pages_;
  std::unique_ptr<Device<int64_t>> begin_, end_, k_;
  std::vector<int64_t> host_begin_, host_end_, host_k_;
};

struct Results {
  std::vector<float> scores;
  std::vector<int64_t> ids;
};

Results search(SearchTopkArgs args, const SearchPlan& plan, int64_t num_lists) {
  const auto places = static_cast<size_t>(args.shape.num_rows * num_lists * args.shape.max_k);
  const Device<float> scores(std::vector<float>(places, std::nanf("")));
  const Device<int64_t> ids(std::vector<int64_t>(places, -77));
  const Device<std::byte> workspace(plan.workspace_bytes);
  const Device<uint32_t> tickets(std::vector<uint32_t>(static_cast<size_t>(plan.num_tickets), 0U));
  args.scores = scores.data();
  args.ids = ids.data();
  Results results;
  for (int repeat = 0; repeat < 2; ++repeat) {  // the second call finds the tickets of the first
    CHECK_CUDA(launch_search_topk(args, plan, workspace.data(), tickets.data(), nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    Results again{scores.host(), ids.host()};
    if (repeat == 1 &&
        (again.ids != results.ids || std::memcmp(again.scores.data(),
                                                 results.scores.data(),
                                                 again.scores.size() * sizeof(float)) != 0)) {
      std::printf("  the second call answers differently\n");
      results.ids.clear();
      return results;
    }
    results = again;
  }
  return results;
}

// What was seen over the lists of a case.
struct SearchVerdict : Verdict {
  double largest_error = 0;  // relative to the sum of the products' sizes
  int64_t near_ties = 0;     // places with another id than the reference's
};

// One list against all scores of its candidates.
void check_list(const double* all,
                const double* magnitudes,
                int64_t begin,
                int64_t end,
                int64_t k,
                int64_t max_k,
                bool exact,
                const float* scores,
                const int64_t* ids,
                int64_t list,
                SearchVerdict& verdict) {
  std::vector<int64_t> ranking;
  for (int64_t entry = begin; entry < end; ++entry) {
    ranking.push_back(entry);
  }
  const int64_t kept = std::min<int64_t>(k, static_cast<int64_t>(ranking.size()));
  std::partial_sort(
      ranking.begin(), ranking.begin() + kept, ranking.end(), [&](int64_t a, int64_t b) {
        const auto first = static_cast<float>(all[a]);
        const auto second = static_cast<float>(all[b]);
        return first != second ? first > second : a < b;
      });
  std::vector<bool> seen(static_cast<size_t>(std::max<int64_t>(end, 1)), false);
  for (int64_t place = 0; place < max_k; ++place) {
    const float score = scores[place];
    const int64_t id = ids[place];
    if (place >= kept) {
      if (id != -1 || score != -kInfinity) {
        verdict.fail("an unused place", list, place, static_cast<double>(id), -1);
      }
      continue;
    }
    const int64_t expected_id = ranking[static_cast<size_t>(place)];
    if (id < begin || id >= end) {
      verdict.fail(
          "no candidate", list, place, static_cast<double>(id), static_cast<double>(expected_id));
      continue;
    }
    if (seen[static_cast<size_t>(id)]) {
      verdict.fail(
          "an id twice", list, place, static_cast<double>(id), static_cast<double>(expected_id));
    }
    seen[static_cast<size_t>(id)] = true;
    const auto expected = static_cast<float>(all[expected_id]);
    const auto own = static_cast<float>(all[id]);
    verdict.near_ties += id != expected_id ? 1 : 0;
    if (exact && id != expected_id) {
      verdict.fail(
          "another id", list, place, static_cast<double>(id), static_cast<double>(expected_id));
    }
    const bool finite = std::isfinite(own) && std::isfinite(expected) && std::isfinite(score);
    if (!finite || exact) {
      if (score != own || score != expected) {
        verdict.fail("another score", list, place, score, expected);
      }
      continue;
    }
    const double error = std::abs(score - all[id]) / std::max(magnitudes[id], 1e-30);
    verdict.largest_error = std::max(verdict.largest_error, error);
    if (!(error < 1e-6)) {
      verdict.fail("the id's score", list, place, score, all[id]);
    }
    if (!(std::abs(score - all[expected_id]) < 1e-6 * (magnitudes[id] + magnitudes[expected_id]))) {
      verdict.fail("the score of the place", list, place, score, all[expected_id]);
    }
  }
}

}  // namespace

bool run_case(Case c, const DeviceInfo& device, std::mt19937_64& random) {
  set_reductions(c.reductions, c.shape);
  DeviceInfo planned = device;
  planned.num_sms = c.num_sms > 0 ? c.num_sms : device.num_sms;
  const SearchPlan plan = plan_search_topk(c.shape, planned);
  if (!plan.supported) {
    std::printf("FAIL %s: not supported\n", c.name.c_str());
    return false;
  }
  const Inputs inputs(c, random);
  const SearchShape& shape = c.shape;
  const int64_t num_lists = static_cast<int64_t>(shape.num_sets()) * shape.lists();
  const Results results = search(inputs.args(), plan, num_lists);
  const auto count = static_cast<size_t>(shape.num_rows * num_lists * shape.num_entries);
  const Device<double> scores(count);
  const Device<double> magnitudes(count);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(264);
  config.blockDim = dim3(256);
  CHECK_CUDA(cudaLaunchKernelEx(
      &config,
      reference_kernel,
      ReferenceArgs{inputs.args(), c.reductions, scores.data(), magnitudes.data()},
      static_cast<int>(num_lists)));
  CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<double> all = scores.host();
  const std::vector<double> sizes = magnitudes.host();
  SearchVerdict verdict;
  verdict.passed = !results.ids.empty() || shape.num_rows * shape.max_k == 0;
  for (int64_t list = 0; verdict.passed && list < shape.num_rows * num_lists; ++list) {
    const auto row = static_cast<size_t>(list / num_lists);
    check_list(all.data() + list * shape.num_entries,
               sizes.data() + list * shape.num_entries,
               inputs.begin()[row],
               inputs.end()[row],
               inputs.k()[row],
               shape.max_k,
               c.numbers != Numbers::kNormal,
               results.scores.data() + list * shape.max_k,
               results.ids.data() + list * shape.max_k,
               list,
               verdict);
  }
  std::printf("%s %s: %s, %lld blocks, %d shares; error %.2g, %lld other ids\n",
              verdict.passed ? "PASS" : "FAIL",
              c.name.c_str(),
              plan.prefill ? "prefill" : "decode",
              static_cast<long long>(plan.num_blocks),
              plan.num_splits,
              verdict.largest_error,
              static_cast<long long>(verdict.near_ties));
  std::fflush(stdout);
  return verdict.passed;
}

}  // namespace longspan::cuda
