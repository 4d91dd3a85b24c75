// One case of NSA's importance: inputs, the reference on the device, and the comparison.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include <cuda_runtime.h>

#include "bench/cuda_importance_check.h"
#include "bench/cuda_support.h"
#include "kernels/cuda/convert.h"
#include "kernels/cuda/importance.h"
#include "kernels/page.h"

namespace longspan::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Errors of a score that are put down to rounding, relative to the score: a few units of fp32 in a
// logit of about 10.
constexpr double kTolerance = 1e-5;

__device__ double logit(const ImportanceArgs& args, int64_t row, int head, int64_t window) {
  const ImportanceShape& shape = args.shape;
  const int kv_head = head / shape.group();
  const size_t key =
      (static_cast<size_t>(kv_head) * kPageTokens + static_cast<size_t>(window % kPageTokens)) *
      static_cast<size_t>(shape.dim);
  const size_t query = static_cast<size_t>((row * shape.num_query_heads + head) * shape.dim);
  double sum = 0;
  for (int d = 0; d < shape.dim; ++d) {
    sum +=
        static_cast<double>(
            load_as_float(shape.query_dtype, args.query, query + static_cast<size_t>(d))) *
        load_as_float(shape.dtype, args.pages[window / kPageTokens], key + static_cast<size_t>(d));
  }
  return sum * static_cast<double>(args.scale);
}

// logits [T][H][n], and lse [T][H] over the visible ones.
__global__ void logits_kernel(const ImportanceArgs args, double* logits, float* lse) {
  const ImportanceShape& shape = args.shape;
  const int64_t total = shape.num_rows * shape.num_query_heads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / shape.num_query_heads;
    double* own = logits + i * shape.num_windows;
    double largest = -INFINITY;
    for (int64_t window = 0; window < args.visible_windows[row]; ++window) {
      own[window] = logit(args, row, static_cast<int>(i % shape.num_query_heads), window);
      largest = own[window] > largest ? own[window] : largest;
    }
    double sum = 0;
    for (int64_t window = 0; window < args.visible_windows[row]; ++window) {
      // What is not finite is left out, so that other windows keep a finite probability.
      sum += fabs(own[window]) < INFINITY ? exp(own[window] - (largest < INFINITY ? largest : 0))
                                          : 0.0;
    }
    lse[i] = static_cast<float>(log(sum) + (largest < INFINITY ? largest : 0));
  }
}

// scores [T][G][blocks], as kernels/reference has them.
__global__ void reference_kernel(const ImportanceArgs args,
                                 const double* logits,
                                 int64_t num_blocks,
                                 double* scores) {
  const ImportanceShape& shape = args.shape;
  const int64_t total = shape.num_rows * shape.num_kv_heads * num_blocks;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t block = i % num_blocks;
    const int kv_head = static_cast<int>(i / num_blocks % shape.num_kv_heads);
    const int64_t row = i / num_blocks / shape.num_kv_heads;
    double joined = 0;
    for (int head = kv_head * shape.group(); head < (kv_head + 1) * shape.group(); ++head) {
      const int64_t index = row * shape.num_query_heads + head;
      double sum = 0;
      for (int64_t window = 0; window < args.visible_windows[row]; ++window) {
        const int64_t begin = window * shape.stride_tokens;
        const int64_t first = block * shape.block_tokens;
        const int64_t overlap =
            min(begin + shape.window_tokens, first + shape.block_tokens) - max(begin, first);
        if (overlap > 0) {
          sum += static_cast<double>(overlap) / shape.stride_tokens *
                 exp(logits[index * shape.num_windows + window] -
                     static_cast<double>(args.lse[index]));
        }
      }
      joined += sum != sum ? -INFINITY : sum;
    }
    joined = shape.mean_of_heads ? joined / shape.group() : joined;
    scores[i] = joined != joined ? -INFINITY : joined;
  }
}

// The inputs of a case, as they lie in device memory. Pages lie in random order and have values
// behind the keys; what no window fills is NaN.
struct Inputs {
  std::vector<std::byte> query;
  std::vector<std::byte> arena;
  std::vector<size_t> page_offsets;
  std::vector<int64_t> visible, begin, end, k;
};

Inputs make_inputs(const ImportanceCase& c, std::mt19937_64& random) {
  const ImportanceShape& shape = c.shape;
  std::normal_distribution<float> normal;
  const auto between = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  Inputs inputs;
  std::vector<float> query(static_cast<size_t>(shape.num_rows * shape.num_query_heads * shape.dim));
  for (float& value : query) {
    value = 2 * normal(random);
    value = c.rounded_queries ? bfloat16_to_float(float_to_bfloat16(value)) : value;
  }
  inputs.query = encode(shape.query_dtype, query);

  const int64_t num_pages = (shape.num_windows + kPageTokens - 1) / kPageTokens;
  const auto page_elements = static_cast<size_t>(2 * shape.num_kv_heads * kPageTokens * shape.dim);
  std::vector<float> values(page_elements * static_cast<size_t>(num_pages),
                            std::numeric_limits<float>::quiet_NaN());
  std::vector<size_t> order(static_cast<size_t>(num_pages));
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
  }
  std::shuffle(order.begin(), order.end(), random);
  for (int64_t window = 0; window < shape.num_windows; ++window) {
    const size_t page = order[static_cast<size_t>(window / kPageTokens)] * page_elements;
    for (int64_t i = 0; i < int64_t{shape.num_kv_heads} * shape.dim; ++i) {
      const int64_t head = i / shape.dim;
      const int64_t place = (head * kPageTokens + window % kPageTokens) * shape.dim + i % shape.dim;
      const bool special = c.special && between(0, 2999) == 0;
      values[page + static_cast<size_t>(place)] = !special ? normal(random)
                                                  : between(0, 1) == 0
                                                      ? std::numeric_limits<float>::quiet_NaN()
                                                      : kInfinity;
    }
  }
  inputs.arena = encode(shape.dtype, values);
  for (const size_t place : order) {
    inputs.page_offsets.push_back(place * page_elements * size_of(shape.dtype));
  }
  const int64_t num_blocks = shape.num_windows / shape.windows_per_block() + 1;
  for (int64_t row = 0; row < shape.num_rows; ++row) {
    const bool whole = row == 0;
    inputs.visible.push_back(whole ? shape.num_windows : between(0, shape.num_windows));
    inputs.end.push_back(whole ? num_blocks : between(0, num_blocks));
    inputs.begin.push_back(whole || between(0, 1) == 0 ? 0 : between(0, inputs.end.back()));
    inputs.k.push_back(whole ? shape.max_k : between(0, shape.max_k));
  }
  return inputs;
}

struct ImportanceVerdict : Verdict {
  double largest_error = 0;
  int64_t other_ids = 0;
};

bool near(double got, double expected) {
  return got == expected ||
         std::abs(got - expected) <= kTolerance * std::max(std::abs(expected), 1e-30);
}

// One list against the scores of all blocks.
void check_list(const double* all,
                int64_t begin,
                int64_t end,
                int64_t k,
                int64_t max_k,
                const float* scores,
                const int64_t* ids,
                int64_t list,
                ImportanceVerdict& verdict) {
  std::vector<int64_t> ranking;
  for (int64_t block = begin; block < end; ++block) {
    ranking.push_back(block);
  }
  std::sort(ranking.begin(), ranking.end(), [&](int64_t a, int64_t b) {
    return all[a] != all[b] ? all[a] > all[b] : a < b;
  });
  const int64_t kept = std::min<int64_t>(k, static_cast<int64_t>(ranking.size()));
  std::vector<bool> seen(static_cast<size_t>(std::max<int64_t>(end, 1)), false);
  for (int64_t place = 0; place < max_k; ++place) {
    const int64_t id = ids[place];
    const double score = static_cast<double>(scores[place]);
    if (place >= kept) {
      if (id != -1 || scores[place] != -kInfinity) {
        verdict.fail("an unused place", list, place, static_cast<double>(id), -1);
      }
      continue;
    }
    const int64_t expected_id = ranking[static_cast<size_t>(place)];
    if (id < begin || id >= end || seen[static_cast<size_t>(id)]) {
      verdict.fail("no candidate, or one twice",
                   list,
                   place,
                   static_cast<double>(id),
                   static_cast<double>(expected_id));
      continue;
    }
    seen[static_cast<size_t>(id)] = true;
    verdict.other_ids += id != expected_id ? 1 : 0;
    if (!near(score, all[id])) {
      verdict.fail("the id's score", list, place, score, all[id]);
    }
    if (!near(score, all[expected_id])) {
      verdict.fail("the score of the place", list, place, score, all[expected_id]);
    }
    if (std::isfinite(score) && std::isfinite(all[id])) {
      verdict.largest_error = std::max(
          verdict.largest_error, std::abs(score - all[id]) / std::max(std::abs(all[id]), 1e-30));
    }
  }
}

}  // namespace

std::string describe(const ImportanceCase& c) {
  const ImportanceShape& s = c.shape;
  char text[256];
  std::snprintf(
      text,
      sizeof(text),
      "%s: %lld rows, heads %d/%d, d %d, %lld windows of %d every %d, blocks of %d, k %lld, "
      "%s query %s%s%s",
      c.name.c_str(),
      static_cast<long long>(s.num_rows),
      s.num_query_heads,
      s.num_kv_heads,
      s.dim,
      static_cast<long long>(s.num_windows),
      s.window_tokens,
      s.stride_tokens,
      s.block_tokens,
      static_cast<long long>(s.max_k),
      std::string(to_string(s.dtype)).c_str(),
      std::string(to_string(s.query_dtype)).c_str(),
      c.rounded_queries ? " rounded" : "",
      c.special ? ", some not finite" : "");
  return text;
}

bool run_importance_case(const ImportanceCase& c,
                         const DeviceInfo& device,
                         std::mt19937_64& random) {
  DeviceInfo planned = device;
  planned.num_sms = c.num_sms > 0 ? c.num_sms : device.num_sms;
  const ImportanceShape& shape = c.shape;
  const ImportancePlan plan = plan_importance(shape, planned);
  if (plan.declined != nullptr) {
    std::printf("FAIL %s: declined, %s\n", describe(c).c_str(), plan.declined);
    return false;
  }
  const Inputs inputs = make_inputs(c, random);
  const Device<std::byte> query(inputs.query);
  const Device<std::byte> arena(inputs.arena);
  std::vector<const std::byte*> pages;
  for (const size_t offset : inputs.page_offsets) {
    pages.push_back(arena.data() + offset);
  }
  const Device<const std::byte*> device_pages(pages);
  const Device<int64_t> visible(inputs.visible);
  const Device<int64_t> begin(inputs.begin);
  const Device<int64_t> end(inputs.end);
  const Device<int64_t> k(inputs.k);
  const Device<float> lse(static_cast<size_t>(shape.num_rows * shape.num_query_heads));
  const int64_t num_blocks = shape.num_windows / shape.windows_per_block() + 1;
  const int64_t num_lists = shape.num_rows * shape.num_kv_heads;
  const Device<double> logits(
      static_cast<size_t>(shape.num_rows * shape.num_query_heads * shape.num_windows));
  const Device<double> expected(static_cast<size_t>(num_lists * num_blocks));
  const auto places = static_cast<size_t>(num_lists * shape.max_k);
  const Device<float> scores(std::vector<float>(places, std::nanf("")));
  const Device<int64_t> ids(std::vector<int64_t>(places, -77));
  ImportanceArgs args;
  args.shape = shape;
  args.query = query.data();
  args.pages = device_pages.data();
  args.lse = lse.data();
  args.scale = 1.0F / std::sqrt(static_cast<float>(shape.dim));
  args.visible_windows = visible.data();
  args.candidate_begin = begin.data();
  args.candidate_end = end.data();
  args.k = k.data();
  args.scores = scores.data();
  args.ids = ids.data();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(264);
  config.blockDim = dim3(128);
  CHECK_CUDA(cudaLaunchKernelEx(&config, logits_kernel, args, logits.data(), lse.data()));
  CHECK_CUDA(cudaLaunchKernelEx(&config,
                                reference_kernel,
                                args,
                                static_cast<const double*>(logits.data()),
                                num_blocks,
                                expected.data()));
  CHECK_CUDA(cudaDeviceSynchronize());

  ImportanceVerdict verdict;
  const Device<std::byte> workspace(plan.workspace_bytes);
  const Device<uint32_t> tickets(std::vector<uint32_t>(static_cast<size_t>(plan.num_tickets), 0U));
  std::vector<int64_t> first_ids;
  for (int repeat = 0; repeat < 2; ++repeat) {  // the second call finds the tickets of the first
    CHECK_CUDA(launch_importance(args, plan, workspace.data(), tickets.data(), nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    const std::vector<int64_t> again = ids.host();
    if (repeat == 1 && again != first_ids) {
      verdict.fail("the second call answers differently", 0, 0, 0, 0);
    }
    first_ids = again;
  }
  const std::vector<double> all = expected.host();
  const std::vector<float> got = scores.host();
  for (int64_t list = 0; verdict.passed && list < num_lists; ++list) {
    const auto row = static_cast<size_t>(list / shape.num_kv_heads);
    check_list(all.data() + list * num_blocks,
               inputs.begin[row],
               inputs.end[row],
               inputs.k[row],
               shape.max_k,
               got.data() + list * shape.max_k,
               first_ids.data() + list * shape.max_k,
               list,
               verdict);
  }
  std::printf("%s %s: %lld blocks of %d, %d shares; error %.2g, %lld other ids\n",
              verdict.passed ? "PASS" : "FAIL",
              describe(c).c_str(),
              static_cast<long long>(plan.num_groups),
              plan.warpgroups * 128,
              plan.num_splits,
              verdict.largest_error,
              static_cast<long long>(verdict.other_ids));
  std::fflush(stdout);
  return verdict.passed;
}

std::vector<ImportanceCase> importance_cases() {
  std::vector<ImportanceCase> cases;
  const auto add =
      [&](const char* name, int heads, int kv_heads, int dim, int64_t rows, int64_t windows) {
        ImportanceCase c;
        c.name = name;
        c.shape.num_rows = rows;
        c.shape.num_query_heads = heads;
        c.shape.num_kv_heads = kv_heads;
        c.shape.dim = dim;
        c.shape.num_windows = windows;
        c.shape.max_k = 16;
        c.shape.query_dtype = DataType::kBFloat16;
        c.shape.window_tokens = 32;
        c.shape.stride_tokens = 16;
        c.shape.block_tokens = 64;
        cases.push_back(c);
        return &cases.back();
      };
  for (const int group : {1, 3, 4, 5, 8, 12, 16}) {
    for (const int dim : {64, 128}) {
      ImportanceCase* c = add("groups", 2 * group, 2, dim, 21, 300);
      c->num_sms = 1;
      c->shape.mean_of_heads = group % 2 == 0;
      c = add("groups, fp32", 2 * group, 2, dim, 21, 300);
      c->num_sms = 1;
      c->shape.query_dtype = DataType::kFloat32;
      c->rounded_queries = group % 2 == 0;
    }
  }
  for (const int64_t windows : {0, 1, 3, 63, 64, 65, 500, 1500}) {
    for (const int64_t rows : {1, 3, 40}) {
      ImportanceCase* c = add("sizes", 16, 1, 64, rows, windows);
      c->num_sms = windows % 2 == 0 ? 1 : 132;
      c->shape.max_k = windows % 3 == 0 ? 100 : 20;
      c->shape.dtype = rows == 3 ? DataType::kFloat16 : DataType::kBFloat16;
      c->shape.query_dtype = c->shape.dtype;
    }
  }
  struct Windows {
    int window, stride, block;
  };
  for (const Windows w : {Windows{64, 64, 64},
                          Windows{32, 16, 128},
                          Windows{32, 32, 64},
                          Windows{64, 16, 64},
                          Windows{16, 16, 16},
                          Windows{32, 1, 64}}) {
    ImportanceCase* c = add("windows", 32, 2, 64, 30, 400);
    c->num_sms = 1;
    c->shape.window_tokens = w.window;
    c->shape.stride_tokens = w.stride;
    c->shape.block_tokens = w.block;
    c = add("windows, shares", 8, 2, 128, 2, 1000);
    c->num_sms = 12;
    c->shape.window_tokens = w.window;
    c->shape.stride_tokens = w.stride;
    c->shape.block_tokens = w.block;
  }
  add("special", 8, 2, 64, 30, 200)->special = true;
  add("decode", 64, 4, 128, 1, 5000)->num_sms = 132;
  add("decode", 32, 8, 128, 1, 5000)->num_sms = 132;
  add("prefill", 64, 4, 128, 40, 3000)->num_sms = 1;
  add("prefill", 32, 8, 128, 70, 3000)->num_sms = 1;
  return cases;
}

}  // namespace longspan::cuda
