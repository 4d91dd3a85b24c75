// One case of the sparse decode step: the reference in two steps on the device, and the comparison.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include <cuda_runtime.h>

#include "bench/cuda_sparse_cases.h"
#include "bench/cuda_sparse_inputs.h"
#include "bench/cuda_support.h"
#include "kernels/cuda/convert.h"
#include "kernels/cuda/sparse_decode.h"

namespace longspan::cuda {
namespace {

// ---- The reference ----

struct ReferenceArgs {
  SparseDecodeArgs step;
  double* scores;          // [T][S][n]
  double* magnitudes;      // [T][S][n]
  const int64_t* offsets;  // [T * S + 1] of
  const int* tokens;       // what each list attends to
  int64_t most_tokens;     // of a list
  double* logits;          // [T][H][most_tokens]
  double* expected;        // [T][H][D]
  double* sizes;           // [T][H][D]: sums of weights times |values|
  double* lse;             // [T][H]
};

__global__ void reference_scores(const ReferenceArgs args) {
  const SearchTopkArgs& search = args.step.search;
  const SearchShape& shape = args.step.shape.search;
  const int lists = shape.num_kv_heads * shape.lists();
  const int per_list = shape.num_query_heads / lists;
  const bool mean = shape.query_form == QueryForm::kGroupMean;
  const int64_t total = shape.num_rows * lists * shape.num_entries;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t entry = i % shape.num_entries;
    const int list = static_cast<int>(i / shape.num_entries % lists);
    const int64_t row = i / shape.num_entries / lists;
    const int kv_head = list / shape.lists();
    double score = 0;
    double magnitude = 0;
    // A mean is of the query; a sum is of scores, each of them -inf where it is NaN.
    for (int group = 0; group < (mean ? 1 : per_list); ++group) {
      double sum = 0;
      for (int d = 0; d < shape.dim; ++d) {
        double query = 0;
        for (int h = mean ? 0 : group; h < (mean ? per_list : group + 1); ++h) {
          const int64_t index = (row * shape.num_query_heads + list * per_list + h) * shape.dim + d;
          query += static_cast<double>(
                       load_as_float(shape.query_dtype, search.query, static_cast<size_t>(index))) /
                   (mean ? per_list : 1);
        }
        const double key = static_cast<double>(load_as_float(
            shape.dtype,
            search.pages[entry / kPageTokens],
            static_cast<size_t>((kv_head * kPageTokens + entry % kPageTokens) * shape.dim + d)));
        sum += query * key;
        magnitude += fabs(query * key);
      }
      score += sum != sum ? -INFINITY : sum;
    }
    score /= static_cast<double>(shape.divisor);
    args.scores[i] = score != score ? -INFINITY : score;
    args.magnitudes[i] = magnitude / static_cast<double>(shape.divisor);
  }
}

__device__ double kv_element(const ReferenceArgs& args, int token, int kv_head, int d, bool value) {
  const PagedView& kv = args.step.kv;
  const std::byte* page = kv.pages[token / kPageTokens] + (value ? kv.value_offset_bytes() : 0);
  return static_cast<double>(load_as_float(
      kv.dtype,
      page,
      static_cast<size_t>((kv_head * kPageTokens + token % kPageTokens) * kv.key_dim + d)));
}

__global__ void reference_logits(const ReferenceArgs args) {
  const SearchShape& shape = args.step.shape.search;
  const int lists = shape.num_kv_heads * shape.lists();
  const int64_t heads = shape.num_rows * shape.num_query_heads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
       i < heads * args.most_tokens;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t head = i / args.most_tokens;
    const int64_t row = head / shape.num_query_heads;
    const int list = static_cast<int>(head % shape.num_query_heads) * lists / shape.num_query_heads;
    const int64_t first = args.offsets[row * lists + list];
    const int64_t place = i % args.most_tokens;
    if (first + place >= args.offsets[row * lists + list + 1]) {
      continue;
    }
    const int token = args.tokens[first + place];
    double logit = 0;
    for (int d = 0; d < shape.dim; ++d) {
      logit += static_cast<double>(load_as_float(args.step.shape.attention_query_dtype,
                                                 args.step.query,
                                                 static_cast<size_t>(head * shape.dim + d))) *
               kv_element(args, token, list / shape.lists(), d, /*value=*/false);
    }
    logit *= static_cast<double>(args.step.scale);
    const auto cap = static_cast<double>(args.step.soft_cap);
    args.logits[i] = cap > 0 ? cap * tanh(logit / cap) : logit;
  }
}

__global__ void reference_outputs(const ReferenceArgs args) {
  const SearchShape& shape = args.step.shape.search;
  const int lists = shape.num_kv_heads * shape.lists();
  const int64_t total = shape.num_rows * shape.num_query_heads * shape.dim;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t head = i / shape.dim;
    const int list = static_cast<int>(head % shape.num_query_heads) * lists / shape.num_query_heads;
    const int64_t* offset = args.offsets + head / shape.num_query_heads * lists + list;
    const int64_t count = offset[1] - offset[0];
    const double* logits = args.logits + head * args.most_tokens;
    double maximum = -INFINITY;
    for (int64_t t = 0; t < count; ++t) {
      maximum = fmax(maximum, logits[t]);
    }
    double sum = 0;
    double out = 0;
    double size = 0;
    for (int64_t t = 0; t < count; ++t) {
      const double weight = exp(logits[t] - maximum);
      const double value = kv_element(args,
                                      args.tokens[offset[0] + t],
                                      list / shape.lists(),
                                      static_cast<int>(i % shape.dim),
                                      /*value=*/true);
      sum += weight;
      out += weight * value;
      size += weight * fabs(value);
    }
    args.expected[i] = count == 0 ? 0.0 : out / sum;
    args.sizes[i] = count == 0 ? 0.0 : size / sum;
    args.lse[head] = count == 0 ? -INFINITY : maximum + log(sum);
  }
}

template <class Kernel>
void launch_reference(Kernel kernel, const ReferenceArgs& args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(264);
  config.blockDim = dim3(256);
  CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, args));
  CHECK_CUDA(cudaDeviceSynchronize());
}

// ---- The comparison ----

struct Results {
  std::vector<float> scores;
  std::vector<int64_t> ids;
  std::vector<std::byte> out;
  std::vector<float> lse;

  bool operator==(const Results& other) const {
    return ids == other.ids && out == other.out && same_bits(scores, other.scores) &&
           same_bits(lse, other.lse);
  }
  static bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
};

struct SparseVerdict : Verdict {
  double score_error = 0;  // relative to the sum of the products' sizes
  double out_error = 0;    // relative to the sum of the weighted values' sizes
  double lse_error = 0;
  int64_t near_ties = 0;  // places with another id than the reference's
};

struct ListScores {
  const double* scores;      // [n]
  const double* magnitudes;  // [n]
  int64_t begin;
  int64_t end;
  int64_t k;
};

// One list against all scores of its candidates.
void check_list(const ListScores& all,
                int64_t max_k,
                SparseNumbers numbers,
                const float* scores,
                const int64_t* ids,
                int64_t list,
                SparseVerdict& verdict) {
  std::vector<int64_t> ranking;
  for (int64_t entry = all.begin; entry < all.end; ++entry) {
    ranking.push_back(entry);
  }
  const int64_t kept = std::min<int64_t>(all.k, static_cast<int64_t>(ranking.size()));
  std::partial_sort(
      ranking.begin(), ranking.begin() + kept, ranking.end(), [&](int64_t a, int64_t b) {
        const auto first = static_cast<float>(all.scores[a]);
        const auto second = static_cast<float>(all.scores[b]);
        return first != second ? first > second : a < b;
      });
  std::vector<bool> seen(static_cast<size_t>(std::max<int64_t>(all.end, 1)), false);
  for (int64_t place = 0; place < max_k; ++place) {
    const float score = scores[place];
    const int64_t id = ids[place];
    if (place >= kept) {
      if (id != -1 || score != -kSparseInfinity) {
        verdict.fail("an unused place", list, place, static_cast<double>(id), -1);
      }
      continue;
    }
    const int64_t expected_id = ranking[static_cast<size_t>(place)];
    if (id < all.begin || id >= all.end || seen[static_cast<size_t>(id)]) {
      verdict.fail("no candidate, or twice",
                   list,
                   place,
                   static_cast<double>(id),
                   static_cast<double>(expected_id));
      continue;
    }
    seen[static_cast<size_t>(id)] = true;
    verdict.near_ties += id != expected_id ? 1 : 0;
    const double expected = all.scores[expected_id];
    const bool exact = numbers == SparseNumbers::kWhole || numbers == SparseNumbers::kSpecial;
    if (id != expected_id && (exact || numbers == SparseNumbers::kEqual)) {
      verdict.fail(
          "another id", list, place, static_cast<double>(id), static_cast<double>(expected_id));
    }
    if (exact) {
      if (score != static_cast<float>(expected)) {
        verdict.fail("another score", list, place, score, expected);
      }
      continue;
    }
    const double error = std::abs(score - all.scores[id]) / std::max(all.magnitudes[id], 1e-30);
    verdict.score_error = std::max(verdict.score_error, error);
    if (!(error < 1e-6)) {
      verdict.fail("the id's score", list, place, score, all.scores[id]);
    }
    if (!(std::abs(score - expected) < 1e-6 * (all.magnitudes[id] + all.magnitudes[expected_id]))) {
      verdict.fail("the score of the place", list, place, score, expected);
    }
  }
}

// What each list has to attend to, given the blocks that were found: ascending tokens.
void joined_tokens(const SparseCase& c,
                   const SparseInputs& inputs,
                   const std::vector<int64_t>& ids,
                   int64_t num_lists,
                   std::vector<int64_t>& offsets,
                   std::vector<int>& tokens) {
  const ForcedTokens& forced = c.shape.forced;
  const int64_t max_k = c.shape.search.max_k;
  offsets.assign(1, 0);
  for (int64_t list = 0; list < c.shape.search.num_rows * num_lists; ++list) {
    const int64_t count = inputs.num_tokens()[static_cast<size_t>(list / num_lists)];
    const int64_t own = (count - 1) / kPageTokens;
    std::vector<bool> found(static_cast<size_t>(own + 1), false);
    for (int64_t i = 0; i < max_k; ++i) {
      const int64_t id = ids[static_cast<size_t>(list * max_k + i)];
      if (id >= 0) {
        found[static_cast<size_t>(id)] = true;
      }
    }
    for (int64_t token = 0; token < count; ++token) {
      const int64_t block = token / kPageTokens;
      if (found[static_cast<size_t>(block)] || block < forced.first_blocks ||
          block > own - forced.last_blocks || token < forced.sink_tokens ||
          token >= count - forced.window_tokens) {
        tokens.push_back(static_cast<int>(token));
      }
    }
    offsets.push_back(static_cast<int64_t>(tokens.size()));
  }
}

void check_outputs(const SparseCase& c,
                   const ReferenceArgs& reference,
                   const Results& results,
                   SparseVerdict& verdict) {
  const SearchShape& shape = c.shape.search;
  const auto heads = static_cast<size_t>(shape.num_rows * shape.num_query_heads);
  const auto dim = static_cast<size_t>(shape.dim);
  std::vector<double> expected(heads * dim);
  std::vector<double> sizes(heads * dim);
  std::vector<double> lse(heads);
  const auto fetch = [](std::vector<double>& host, const double* device) {
    CHECK_CUDA(
        cudaMemcpy(host.data(), device, host.size() * sizeof(double), cudaMemcpyDeviceToHost));
  };
  fetch(expected, reference.expected);
  fetch(sizes, reference.sizes);
  fetch(lse, reference.lse);
  const double weight_rounding = shape.dtype == DataType::kFloat16 ? 0x1p-11 : 0x1p-9;
  const double out_rounding = c.out_dtype == DataType::kFloat32   ? 0
                              : c.out_dtype == DataType::kFloat16 ? 0x1p-11
                                                                  : 0x1p-8;
  for (size_t head = 0; head < heads; ++head) {
    const double lse_error = lse[head] == static_cast<double>(results.lse[head])
                                 ? 0
                                 : std::abs(results.lse[head] - lse[head]);
    verdict.lse_error = std::max(verdict.lse_error, lse_error);
    if (!(lse_error < 5e-4)) {
      verdict.fail("lse of head", static_cast<int64_t>(head), 0, results.lse[head], lse[head]);
    }
    for (size_t d = 0; d < dim; ++d) {
      const size_t i = head * dim + d;
      const double got = load_element(c.out_dtype, results.out.data(), i);
      const double error = std::abs(got - expected[i]) / std::max(sizes[i], 1e-30);
      verdict.out_error = std::max(verdict.out_error, error);
      if (!(error < weight_rounding + out_rounding + 5e-4)) {
        verdict.fail("output of head",
                     static_cast<int64_t>(head),
                     static_cast<int64_t>(d),
                     got,
                     expected[i]);
      }
    }
  }
}

Results run_step(SparseDecodeArgs args, const SparsePlan& plan, bool& repeatable) {
  const SearchShape& shape = args.shape.search;
  const auto places = static_cast<size_t>(plan.num_lists * shape.max_k);
  const auto heads = static_cast<size_t>(shape.num_rows * shape.num_query_heads);
  Results results;
  repeatable = true;
  for (int repeat = 0; repeat < 2; ++repeat) {
    const Device<float> scores(std::vector<float>(places, kSparseNaN));
    const Device<int64_t> ids(std::vector<int64_t>(places, -77));
    const Device<std::byte> out(std::vector<std::byte>(
        heads * static_cast<size_t>(shape.dim) * size_of(args.out_dtype), std::byte{0xFF}));
    const Device<float> lse(std::vector<float>(heads, kSparseNaN));
    args.search.scores = scores.data();
    args.search.ids = ids.data();
    args.out = out.data();
    args.lse = lse.data();
    CHECK_CUDA(launch_sparse_decode(args, plan, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
#ifdef LONGSPAN_CUDA_SPIN_LIMIT
    report_sparse_spin();
#endif
    const Results again{scores.host(), ids.host(), out.host(), lse.host()};
    repeatable = repeat == 0 || again == results;
    results = again;
  }
  return results;
}

}  // namespace

bool run_sparse_case(const SparseCase& original,
                     const DeviceInfo& device,
                     std::mt19937_64& random) {
  SparseCase c = original;
  SearchShape& shape = c.shape.search;
  shape.num_entries = c.num_tokens / kPageTokens;
  DeviceInfo planned = device;
  planned.num_sms = c.num_sms;
  const SparsePlan plan = plan_sparse_decode(c.shape, planned, c.max_cluster_size);
  if (!plan.supported) {
    std::printf("FAIL %s: not supported\n", describe(c).c_str());
    return false;
  }
  const SparseInputs inputs(c, random);
  SparseVerdict verdict;
  bool repeatable = true;
  const Results results = run_step(inputs.args(), plan, repeatable);
  if (!repeatable) {
    verdict.fail("the second call answers differently", 0, 0, 0, 0);
  }

  const int64_t num_lists = plan.num_lists / shape.num_rows;
  const auto num_scores = static_cast<size_t>(plan.num_lists * shape.num_entries);
  const Device<double> scores(num_scores);
  const Device<double> magnitudes(num_scores);
  ReferenceArgs reference = {};
  reference.step = inputs.args();
  reference.scores = scores.data();
  reference.magnitudes = magnitudes.data();
  launch_reference(reference_scores, reference);
  const std::vector<double> all = scores.host();
  const std::vector<double> sizes = magnitudes.host();
  for (int64_t list = 0; list < plan.num_lists; ++list) {
    const auto row = static_cast<size_t>(list / num_lists);
    check_list({all.data() + list * shape.num_entries,
                sizes.data() + list * shape.num_entries,
                inputs.begin()[row],
                inputs.end()[row],
                inputs.k()[row]},
               shape.max_k,
               c.numbers,
               results.scores.data() + list * shape.max_k,
               results.ids.data() + list * shape.max_k,
               list,
               verdict);
  }
  if (c.shape.attends && verdict.passed) {
    std::vector<int64_t> offsets;
    std::vector<int> tokens;
    joined_tokens(c, inputs, results.ids, num_lists, offsets, tokens);
    const Device<int64_t> device_offsets(offsets);
    const Device<int> device_tokens(tokens);
    for (size_t i = 1; i < offsets.size(); ++i) {
      reference.most_tokens = std::max(reference.most_tokens, offsets[i] - offsets[i - 1]);
    }
    const auto heads = static_cast<size_t>(shape.num_rows * shape.num_query_heads);
    const Device<double> logits(heads * static_cast<size_t>(reference.most_tokens));
    const Device<double> expected(heads * static_cast<size_t>(shape.dim));
    const Device<double> weighted(heads * static_cast<size_t>(shape.dim));
    const Device<double> lse(heads);
    reference.offsets = device_offsets.data();
    reference.tokens = device_tokens.data();
    reference.logits = logits.data();
    reference.expected = expected.data();
    reference.sizes = weighted.data();
    reference.lse = lse.data();
    launch_reference(reference_logits, reference);
    launch_reference(reference_outputs, reference);
    check_outputs(c, reference, results, verdict);
  }
  std::printf(
      "%s %s: clusters of %d, %d stages; errors: scores %.2g, out %.2g, lse %.2g; %lld "
      "other ids\n",
      verdict.passed ? "PASS" : "FAIL",
      describe(c).c_str(),
      plan.cluster_size,
      plan.num_stages,
      verdict.score_error,
      verdict.out_error,
      verdict.lse_error,
      static_cast<long long>(verdict.near_ties));
  std::fflush(stdout);
  return verdict.passed;
}

}  // namespace longspan::cuda
