// Checks and times the fused search of kernels/cuda (search_topk.h) on one GPU, alone: no other
// library of ours. Checks first: every result against scores in double precision on the same
// inputs. Then times, with the fraction of the memory's or the tensor cores' floor.
//
//   cuda_search [--quick] [--seed N] [--only TEXT] [--json FILE]
//
// --json adds a line a timed case to a file.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "bench/cuda_search_cases.h"
#include "bench/cuda_support.h"
#include "kernels/cuda/search_topk.h"
#include "kernels/page.h"

namespace longspan::cuda {
namespace {

int run_checks(const DeviceInfo& device, uint64_t seed, const std::string& only) {
  std::vector<Case> cases = all_cases();
  int failures = 0;
  int number = 0;
  for (Case& c : cases) {
    std::mt19937_64 random(seed + static_cast<uint64_t>(number++));
    c.name = describe(c);
    if (c.name.find(only) != std::string::npos) {
      failures += run_case(c, device, random) ? 0 : 1;
    }
  }
  std::printf(
      "%s: %d of %zu checks failed\n", failures == 0 ? "OK" : "FAILED", failures, cases.size());
  return failures;
}

// "search prefill 32/8 d128 64K top-16": with a vector for each KV head, unless it says otherwise.
std::string short_name(const SearchShape& shape, bool prefill) {
  const int64_t tokens = shape.num_entries * kPageTokens;
  const bool millions = tokens >= int64_t{1} << 20;
  char text[128];
  std::snprintf(text,
                sizeof(text),
                "search %s %d/%d d%d %lld%s top-%lld%s%s",
                prefill ? "prefill" : "decode",
                shape.num_query_heads,
                shape.num_kv_heads,
                shape.dim,
                static_cast<long long>(millions ? tokens >> 20 : tokens >> 10),
                millions ? "M" : "K",
                static_cast<long long>(shape.max_k),
                shape.score == ScoreForm::kBound ? " bounds" : "",
                shape.query_form == QueryForm::kEachHead ? " of every head" : "");
  return text;
}

// Times a search on random bf16 inputs; several copies of the summaries, so that L2 does not hold
// them.
void time_search(Case c, const DeviceInfo& device, const std::string& json) {
  set_reductions(c.reductions, c.shape);
  SearchShape& shape = c.shape;
  shape.query_dtype = DataType::kBFloat16;
  const SearchPlan plan = plan_search_topk(shape, device);
  if (!plan.supported) {
    std::printf("TIME %s: not supported\n", describe(c).c_str());
    return;
  }
  const int64_t num_pages = (shape.num_entries + kPageTokens - 1) / kPageTokens;
  const size_t page_elements = static_cast<size_t>(shape.num_kv_heads) * kPageTokens *
                               static_cast<size_t>(shape.dim * shape.planes());
  const size_t copy_elements = page_elements * static_cast<size_t>(num_pages);
  const bool rotate = !plan.prefill;
  const size_t copies =
      rotate ? std::clamp<size_t>((size_t{150} << 20) / (2 * copy_elements) + 1, 1, 20) : 1;
  const Device<__nv_bfloat16> arena(copy_elements * copies);
  fill(arena.data(), arena.size(), 1);
  std::vector<const std::byte*> pages;
  for (size_t i = 0; i < copies * static_cast<size_t>(num_pages); ++i) {
    pages.push_back(reinterpret_cast<const std::byte*>(arena.data() + i * page_elements));
  }
  const Device<const std::byte*> device_pages(pages);
  const auto query_elements =
      static_cast<size_t>(shape.num_rows * shape.num_query_heads * shape.dim);
  const Device<__nv_bfloat16> query(query_elements);
  fill(query.data(), query_elements, 7);
  std::vector<int64_t> begin(static_cast<size_t>(shape.num_rows), 0);
  std::vector<int64_t> end;
  const std::vector<int64_t> k(static_cast<size_t>(shape.num_rows), shape.max_k);
  double pairs = 0;
  const double vectors = static_cast<double>(shape.num_kv_heads) * shape.vectors();
  for (int64_t row = 0; row < shape.num_rows; ++row) {
    end.push_back(shape.num_entries * (row + 1) / shape.num_rows);
    pairs += static_cast<double>(end.back()) * vectors;
  }
  const Device<int64_t> device_begin(begin);
  const Device<int64_t> device_end(end);
  const Device<int64_t> device_k(k);
  const auto places =
      static_cast<size_t>(shape.num_rows * shape.num_sets() * shape.lists() * shape.max_k);
  const Device<float> scores(places);
  const Device<int64_t> ids(places);
  const Device<std::byte> workspace(plan.workspace_bytes);
  const Device<uint32_t> tickets(std::vector<uint32_t>(static_cast<size_t>(plan.num_tickets), 0U));
  SearchTopkArgs args;
  args.shape = shape;
  args.query = query.data();
  args.candidate_begin = device_begin.data();
  args.candidate_end = device_end.data();
  args.k = device_k.data();
  args.scores = scores.data();
  args.ids = ids.data();
  const Times times = time_calls(
      [&](int i, cudaStream_t stream) {
        args.pages =
            device_pages.data() + static_cast<size_t>(i) % copies * static_cast<size_t>(num_pages);
        CHECK_CUDA(launch_search_topk(args, plan, workspace.data(), tickets.data(), stream));
      },
      plan.prefill ? 12 : 100);
  const double bytes = 2.0 * static_cast<double>(copy_elements);
  const double flop = 2.0 * pairs * shape.dim * shape.planes();
  std::printf("TIME %s (%s, %lld blocks): single %.2f us, in a graph %.2f us; ",
              describe(c).c_str(),
              plan.prefill ? "prefill" : "decode",
              static_cast<long long>(plan.num_blocks),
              times.single * 1e3,
              times.in_graph * 1e3);
  if (plan.prefill) {
    const double rate = flop / times.in_graph * 1e-9;
    std::printf("%.0f TFLOP/s = %.2f of the floor (%d terms)\n",
                rate,
                rate / kPeakTeraflops,
                plan.num_terms);
  } else {
    const double rate = bytes / times.in_graph * 1e-6;
    std::printf("%.0f GB/s = %.2f of the floor\n", rate, rate / kPeakGigabytes);
  }
  std::fflush(stdout);
  const double floor = std::max(flop / kPeakTeraflops * 1e-9, bytes / kPeakGigabytes * 1e-6);
  append_json(json,
              "cuda_search",
              short_name(shape, plan.prefill),
              {times.in_graph, times.least, times.most},
              flop,
              bytes,
              floor,
              true);
}

void run_times(const DeviceInfo& device, const std::string& json) {
  struct Heads {
    int query;
    int kv;
  };
  for (const Heads heads : {Heads{32, 8}, Heads{64, 4}, Heads{32, 2}}) {
    for (const int64_t entries : {2048, 16384, 163840}) {
      for (const int64_t k : {16, 64, 256}) {
        Case c = make_case("decode", heads.query, heads.kv, 128, entries);
        c.reductions.query = QueryReduce::kGroupMean;
        c.shape.max_k = k;
        time_search(c, device, json);
      }
    }
    Case c = make_case("decode", heads.query, heads.kv, 128, 16384);
    c.shape.max_k = 64;
    time_search(c, device, json);  // every head for itself
    c.shape.score = ScoreForm::kBound;
    c.reductions.head = HeadReduce::kGroupSum;
    time_search(c, device, json);
  }
  for (const Heads heads : {Heads{32, 8}, Heads{64, 4}}) {
    for (const int64_t tokens : {16384, 65536}) {
      for (const int64_t k : {16, 64, 128}) {
        Case c = make_case("prefill", heads.query, heads.kv, 128, tokens / 64);
        c.shape.num_rows = tokens;
        c.shape.max_k = k;
        c.reductions.query = QueryReduce::kGroupMean;
        time_search(c, device, json);
        if (k == 16) {
          c.reductions = {};
          time_search(c, device, json);
        }
      }
    }
  }
}

}  // namespace
}  // namespace longspan::cuda

int main(int argc, char** argv) {
  using namespace longspan::cuda;
  const BenchOptions options = parse_options(argc, argv);
  const DeviceInfo device = open_device(options.seed);
  const int failures = run_checks(device, options.seed, options.only);
  if (!options.quick && failures == 0) {
    run_times(device, options.json);
  }
  return failures == 0 ? 0 : 1;
}
