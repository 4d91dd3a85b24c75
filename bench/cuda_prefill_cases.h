// Random cases of attention of many rows against a naive kernel in double precision, which is
// itself compared with the host.
#pragma once

#include <cstring>
#include <random>
#include <string>

#include "bench/cuda_prefill_support.h"
#include "kernels/cuda/attend_tiles.h"

namespace longspan::cuda {
namespace {

enum class Lists { kCausal, kSpans, kBlocks, kEmpty, kWindow };
enum class Special { kNone, kNanQuery, kNanKey, kInfiniteKey, kNanValue, kInfiniteValue };

struct Case {
  const char* name;
  int num_query_heads;
  int num_kv_heads;
  int key_dim;
  int value_dim;
  int64_t num_rows;
  int64_t num_entries;
  Lists lists = Lists::kCausal;
  int selection = 1;  // 0: one list a row, 1: one a KV head, 2: one a query head
  DataType dtype = DataType::kBFloat16;
  DataType out_dtype = DataType::kFloat32;
  float soft_cap = 0.0F;
  bool row_query = false;
  Special special = Special::kNone;
  int section_heads = 1;
  float scale = 0;             // 0: one by the root of the key size
  bool ordered_pages = false;  // else in random order in the arena
  int num_sms = 0;             // 0: all; few make each block go through many tiles
};

struct SpanLists {
  std::vector<int64_t> offsets{0};
  std::vector<Span> spans;

  void close() { offsets.push_back(static_cast<int64_t>(spans.size())); }
  // Joined to the last span of the list if it touches it.
  void add(int64_t begin, int64_t end) {
    const bool first = static_cast<int64_t>(spans.size()) == offsets.back();
    if (!first && spans.back().end == begin) {
      spans.back().end = end;
    } else if (begin < end) {
      spans.push_back({begin, end});
    }
  }
};

// `position` is the row's own token.
void add_list(SpanLists& lists, Lists kind, int64_t position, int64_t n, std::mt19937_64& random) {
  const auto below = [&](int64_t bound) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(std::max<int64_t>(bound, 1)));
  };
  if (kind == Lists::kCausal) {
    lists.add(0, position + 1);
  } else if (kind == Lists::kWindow) {
    lists.add(0, std::min<int64_t>(4, position + 1));
    lists.add(std::max<int64_t>(position - 99, 4), std::max<int64_t>(position + 1, 4));
  } else if (kind == Lists::kSpans && below(5) > 0) {
    // Any spans, touching ones too, down to single tokens; a fifth of the rows has none.
    int64_t token = below(n);
    for (int i = 0; i < 8 && token < n; ++i) {
      const int64_t end = std::min(n, token + 1 + below(below(2) == 0 ? 4 : 200));
      lists.spans.push_back({token, end});
      token = end + (below(4) == 0 ? 0 : below(150));
    }
  } else if (kind == Lists::kBlocks) {
    const int64_t own = position / 64;
    std::vector<int64_t> blocks;
    for (int i = 0; i < 6; ++i) {
      blocks.push_back(below(own));
    }
    std::sort(blocks.begin(), blocks.end());
    blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
    for (int64_t block : blocks) {
      if (block < own) {
        lists.add(block * 64, block * 64 + 64);
      }
    }
    lists.add(own * 64, position + 1);
  }
  lists.close();
}

// Whether there is a kernel with such tiles.
bool has_tiles(const Case& c, int tile_rows) {
  const int group = c.num_query_heads / c.num_kv_heads;
  const int lists = tile_rows / group * (c.selection == 2 ? group : 1);
  return tile_rows < 192 || (c.key_dim == 64 && lists <= 64);
}

int num_lists(const Case& c) {
  return c.selection == 0 ? 1 : c.selection == 1 ? c.num_kv_heads : c.num_query_heads;
}

// Softmax attention in double precision, a block for one of `rows` (x) and a query head (y).
__global__ void naive_kernel(AttendParams params,
                             const int64_t* rows,
                             double* out,    // [rows][H][E]
                             double* lse) {  // [rows][H]
  __shared__ double logits[256];
  const int head = blockIdx.y;
  const int64_t row = rows[blockIdx.x];
  const int64_t query_row = params.row_query == nullptr ? row : params.row_query[row];
  const int kv_head = head * params.kv.num_kv_heads / params.num_query_heads;
  const int64_t list =
      row * params.num_selection_heads + head * params.num_selection_heads / params.num_query_heads;
  double maximum = -INFINITY;
  double total = 0;
  double sum = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t s = params.span_offsets[list]; s < params.span_offsets[list + 1]; ++s) {
      for (int64_t first = params.spans[s].begin; first < params.spans[s].end; first += 256) {
        const int count = static_cast<int>(min(params.spans[s].end - first, int64_t{256}));
        const int thread = threadIdx.x;
        if (thread < count) {
          double dot = 0;
          for (int d = 0; d < params.kv.key_dim; ++d) {
            dot += static_cast<double>(load_as_float(
                       params.query_dtype,
                       params.query,
                       (query_row * params.num_query_heads + head) * params.kv.key_dim + d)) *
                   load_as_float(params.kv.dtype, params.kv.key(first + thread, kv_head), d);
          }
          dot *= params.scale;
          logits[thread] =
              params.soft_cap > 0 ? params.soft_cap * tanh(dot / params.soft_cap) : dot;
        }
        __syncthreads();
        for (int i = 0; i < count; ++i) {
          if (pass == 0) {
            maximum = fmax(maximum, logits[i]);
            total += isnan(logits[i]) ? 1 : 0;
          } else {
            const double weight = exp(logits[i] - maximum);
            total += weight;
            if (thread < params.kv.value_dim) {
              sum += weight *
                     load_as_float(params.kv.dtype, params.kv.value(first + i, kv_head), thread);
            }
          }
        }
        __syncthreads();
      }
    }
    if (pass == 0) {
      if (maximum == -INFINITY && total == 0) {
        break;
      }
      total = 0;
    }
  }
  const int64_t out_row = static_cast<int64_t>(blockIdx.x) * params.num_query_heads + head;
  const bool empty = maximum == -INFINITY && total == 0;
  if (static_cast<int>(threadIdx.x) < params.kv.value_dim) {
    out[out_row * params.kv.value_dim + threadIdx.x] = empty ? 0 : sum / total;
  }
  if (threadIdx.x == 0) {
    lse[out_row] = empty ? -INFINITY : maximum + log(total);
  }
}

bool in_values(const Case& c) {
  return c.special == Special::kNanValue || c.special == Special::kInfiniteValue;
}
int64_t num_queries(const Case& c) { return c.row_query ? c.num_rows + 7 : c.num_rows; }
int64_t num_pages(const Case& c) { return (c.num_entries + 63) / 64; }
int64_t arena_pages(const Case& c) { return num_pages(c) + 2; }
size_t page_elements(const Case& c) {
  return static_cast<size_t>(c.num_kv_heads) * 64 * (c.key_dim + c.value_dim);
}

// Pages of the context in the arena.
std::vector<const std::byte*> make_pages(const Case& c, const void* arena, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<size_t> order(arena_pages(c));
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
  }
  if (!c.ordered_pages) {
    std::shuffle(order.begin(), order.end(), random);
  }
  std::vector<const std::byte*> pages;
  for (int64_t i = 0; i < num_pages(c); ++i) {
    pages.push_back(static_cast<const std::byte*>(arena) + order[i] * page_elements(c) * 2);
  }
  return pages;
}

std::vector<int64_t> make_row_query(const Case& c, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int64_t> row_query(c.num_rows);
  for (auto& row : row_query) {
    row = static_cast<int64_t>(random() % num_queries(c));
  }
  return row_query;
}

// Everything a case needs in device memory.
struct Problem {
  Memory<uint16_t> arena;
  Memory<uint16_t> query;
  std::vector<const std::byte*> host_pages;
  Memory<const std::byte*> pages;
  Memory<int64_t> row_query;
  Memory<int64_t> offsets;
  Memory<Span> spans;
  Memory<uint8_t> out;
  Memory<float> lse;
  Memory<int32_t> scratch;
  cudaDeviceProp properties;
  AttendTilesArgs args;

  Problem(const Case& c, const SpanLists& lists, uint64_t seed)
      : arena(arena_pages(c) * page_elements(c)),
        query(num_queries(c) * c.num_query_heads * c.key_dim),
        host_pages(make_pages(c, arena.data(), seed)),
        pages(host_pages),
        row_query(make_row_query(c, seed)),
        offsets(lists.offsets),
        spans(lists.spans),
        out(static_cast<size_t>(c.num_rows) * c.num_query_heads * c.value_dim *
            size_of(c.out_dtype)),
        lse(c.num_rows * c.num_query_heads),
        scratch(2 + c.num_rows * c.num_query_heads) {
    fill(c.dtype, arena.data(), arena.size(), 1.0F, seed);
    fill(c.dtype, query.data(), query.size(), 1.5F, seed + 1);
    AttendParams& params = args.params;
    params.query = reinterpret_cast<const float*>(query.data());
    params.query_dtype = c.dtype;
    params.row_query = c.row_query ? row_query.data() : nullptr;
    params.num_rows = c.num_rows;
    params.num_query_heads = c.num_query_heads;
    params.kv.pages = pages.data();
    params.kv.num_entries = c.num_entries;
    params.kv.dtype = c.dtype;
    params.kv.num_kv_heads = c.num_kv_heads;
    params.kv.key_dim = c.key_dim;
    params.kv.value_dim = c.value_dim;
    params.kv.arena = reinterpret_cast<const std::byte*>(arena.data());
    params.kv.arena_bytes = arena.size() * 2;
    params.num_selection_heads = num_lists(c);
    params.span_offsets = offsets.data();
    params.spans = spans.data();
    params.scale = c.scale > 0 ? c.scale : 1.0F / std::sqrt(static_cast<float>(c.key_dim));
    params.soft_cap = c.soft_cap;
    params.out = reinterpret_cast<float*>(out.data());
    params.out_dtype = c.out_dtype;
    params.lse = lse.data();
    cudaGetDeviceProperties(&properties, 0);
    args.num_sms = c.num_sms > 0 ? c.num_sms : properties.multiProcessorCount;
    args.section_heads = c.section_heads;
    args.scratch = scratch.data();
    spoil(c);
  }

  // NaN behind the last token, in keys and in values, where anything may lie; and what the case is
  // about.
  void spoil(const Case& c) {
    const PagedView& kv = args.params.kv;
    for (int64_t token = c.num_entries; token % 64 != 0; ++token) {
      for (int head = 0; head < c.num_kv_heads; ++head) {
        auto* page = const_cast<std::byte*>(host_pages[token / 64]);
        const size_t row = head * 64 + token % 64;
        cudaMemset(page + row * c.key_dim * 2, 0xff, c.key_dim * 2);
        cudaMemset(page + kv.value_offset_bytes() + row * c.value_dim * 2, 0xff, c.value_dim * 2);
      }
    }
    if (c.special == Special::kNanQuery) {  // one element of one head of one query
      const size_t head = static_cast<size_t>(c.num_rows / 2) * c.num_query_heads + 1;
      cudaMemset(query.data() + head * c.key_dim + 3, 0xff, 2);
    } else if (c.special != Special::kNone) {
      const uint16_t infinity = c.dtype == DataType::kFloat16 ? 0x7c00 : 0x7f80;
      const bool nan = c.special == Special::kNanKey || c.special == Special::kNanValue;
      const uint16_t element = nan ? 0xffff : infinity;
      const size_t offset = in_values(c) ? kv.value_offset_bytes() + (1 * c.value_dim + 5) * 2
                                         : (1 * c.key_dim + 5) * 2;
      auto* page = const_cast<std::byte*>(host_pages[c.num_entries / 128]);
      cudaMemcpy(page + offset, &element, 2, cudaMemcpyHostToDevice);
    }
  }
};

// One row of one head on the host, to know that the naive kernel is right.
bool check_naive(const Case& c,
                 const Problem& problem,
                 const SpanLists& lists,
                 int64_t row,
                 int head,
                 const double* naive_out,
                 double naive_lse) {
  const auto query = problem.query.host();
  const auto arena = problem.arena.host();
  const auto rows = problem.row_query.host();
  const auto* base = reinterpret_cast<const std::byte*>(problem.arena.data());
  const int64_t query_row = c.row_query ? rows[row] : row;
  const int kv_head = head / (c.num_query_heads / c.num_kv_heads);
  const int64_t list = row * num_lists(c) + head * num_lists(c) / c.num_query_heads;
  std::vector<double> sums(c.value_dim);
  double total = 0;
  for (int64_t s = lists.offsets[list]; s < lists.offsets[list + 1]; ++s) {
    for (int64_t token = lists.spans[s].begin; token < lists.spans[s].end; ++token) {
      const size_t page = (problem.host_pages[token / 64] - base) / 2;
      const size_t key = page + (kv_head * 64 + token % 64) * c.key_dim;
      const size_t value = page + static_cast<size_t>(c.num_kv_heads) * 64 * c.key_dim +
                           (kv_head * 64 + token % 64) * c.value_dim;
      double logit = 0;
      for (int d = 0; d < c.key_dim; ++d) {
        logit += static_cast<double>(element(
                     c.dtype, query, (query_row * c.num_query_heads + head) * c.key_dim + d)) *
                 element(c.dtype, arena, key + d);
      }
      logit *= problem.args.params.scale;
      logit = c.soft_cap > 0 ? c.soft_cap * std::tanh(logit / c.soft_cap) : logit;
      const double weight = std::exp(logit - (std::isfinite(naive_lse) ? naive_lse : 0.0));
      total += weight;
      for (int e = 0; e < c.value_dim; ++e) {
        sums[e] += weight * element(c.dtype, arena, value + e);
      }
    }
  }
  bool right = total == 0 ? naive_lse == -INFINITY : std::fabs(total - 1) < 1e-6;
  for (int e = 0; e < c.value_dim && right; ++e) {
    right = std::fabs(sums[e] - naive_out[e]) < 1e-6;
  }
  if (!right) {
    std::printf("  the naive kernel is wrong at row %ld head %d\n", static_cast<long>(row), head);
  }
  return right;
}

struct Expected {
  std::vector<double> out;  // [rows][H][E]
  std::vector<double> lse;  // [rows][H]
};

Expected naive(const Problem& problem, const std::vector<int64_t>& rows) {
  const AttendParams& params = problem.args.params;
  Memory<int64_t> device_rows(rows);
  Memory<double> out(rows.size() * params.num_query_heads * params.kv.value_dim);
  Memory<double> lse(rows.size() * params.num_query_heads);
  naive_kernel<<<dim3(rows.size(), params.num_query_heads), 256>>>(
      params, device_rows.data(), out.data(), lse.data());
  succeeded(cudaDeviceSynchronize(), "naive kernel");
  return {out.host(), lse.host()};
}

// The rows `rows` of what was written.
bool compare_rows(const Case& c,
                  const Problem& problem,
                  const std::vector<int64_t>& rows,
                  const Expected& expected) {
  const size_t row_elements = static_cast<size_t>(c.num_query_heads) * c.value_dim;
  const size_t row_bytes = row_elements * size_of(c.out_dtype);
  std::vector<uint8_t> bytes(row_bytes);
  std::vector<float> out;
  std::vector<float> lse(rows.size() * c.num_query_heads);
  for (size_t i = 0; i < rows.size(); ++i) {
    cudaMemcpy(
        bytes.data(), problem.out.data() + rows[i] * row_bytes, row_bytes, cudaMemcpyDeviceToHost);
    cudaMemcpy(lse.data() + i * c.num_query_heads,
               problem.lse.data() + rows[i] * c.num_query_heads,
               c.num_query_heads * sizeof(float),
               cudaMemcpyDeviceToHost);
    for (size_t j = 0; j < row_elements; ++j) {
      out.push_back(load_element(c.out_dtype, bytes.data(), j));
    }
  }
  // Weights are rounded to the type of the cache.
  const double weight_error = c.dtype == DataType::kFloat16 ? 2e-3 : 1.2e-2;
  const double out_error = c.out_dtype == DataType::kBFloat16 ? 1.0 / 256 : 1e-3;
  const bool lse_ok = compare("lse (row x head)", expected.lse, lse, c.num_query_heads, 2e-4, 2e-5);
  return compare(
             "out (row x head, column)", expected.out, out, c.value_dim, weight_error, out_error) &&
         lse_ok;
}

// Twice as one graph, which is to leave nothing behind from one time to the next.
cudaError_t launch_in_graph(const AttendTilesArgs& args) {
  cudaStream_t stream;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaStreamCreate(&stream);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  cudaError_t error = launch_attend_tiles(args, stream);
  const cudaError_t end = cudaStreamEndCapture(stream, &graph);
  error = error == cudaSuccess ? end : error;
  if (error == cudaSuccess) {
    error = cudaGraphInstantiate(&executable, graph);
  }
  for (int i = 0; i < 2 && error == cudaSuccess; ++i) {
    error = cudaGraphLaunch(executable, stream);
  }
  cudaStreamSynchronize(stream);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return error;
}

// False with `lost` set: the device is in an error that stays.
bool run_case(const Case& c, int tile_rows, uint64_t seed, bool* lost) {
  std::mt19937_64 random(seed);
  SpanLists lists;
  for (int64_t row = 0; row < c.num_rows; ++row) {
    for (int s = 0; s < num_lists(c); ++s) {
      add_list(lists, c.lists, c.num_entries - c.num_rows + row, c.num_entries, random);
    }
  }
  Problem problem(c, lists, seed);
  problem.args.tile_rows = tile_rows;
  problem.out.poison();
  problem.lse.poison();
  std::vector<int64_t> rows(c.num_rows);
  for (int64_t row = 0; row < c.num_rows; ++row) {
    rows[row] = row;
  }
  const Expected expected = naive(problem, rows);
  bool right = attend_tiles_supports(problem.args.params);
  if (!right) {
    std::printf("  not supported\n");
  }
  right = right && succeeded(launch_attend_tiles(problem.args, nullptr), "launch");
  *lost = !succeeded(cudaDeviceSynchronize(), "attend_tiles");
  right = right && !*lost && compare_rows(c, problem, rows, expected);
  if (right && in_values(c)) {
    problem.out.poison();
    problem.lse.poison();
    right = succeeded(launch_in_graph(problem.args), "graph");
    *lost = !succeeded(cudaDeviceSynchronize(), "attend_tiles in a graph");
    right = right && !*lost && compare_rows(c, problem, rows, expected);
  }
  const auto row = static_cast<int64_t>(random() % c.num_rows);
  const auto head = static_cast<int>(random() % c.num_query_heads);
  if (!*lost && c.special == Special::kNone) {
    const int64_t place = row * c.num_query_heads + head;
    right = check_naive(c,
                        problem,
                        lists,
                        row,
                        head,
                        &expected.out[place * c.value_dim],
                        expected.lse[place]) &&
            right;
  }
  std::printf("%s %s: tile %d, heads %d/%d, D %d E %d, rows %ld of %ld, lists %d, %s to %s\n",
              right ? "PASS" : "FAIL",
              c.name,
              tile_rows,
              c.num_query_heads,
              c.num_kv_heads,
              c.key_dim,
              c.value_dim,
              static_cast<long>(c.num_rows),
              static_cast<long>(c.num_entries),
              num_lists(c),
              std::string(to_string(c.dtype)).c_str(),
              std::string(to_string(c.out_dtype)).c_str());
  return right;
}

// A case that differs in little from the usual one.
Case make_case(const char* name, int group, int dim, int64_t num_rows, int64_t n, Lists lists) {
  Case c{name, group * 2, 2, dim, dim, num_rows, n, lists};
  c.selection = lists == Lists::kCausal || lists == Lists::kWindow ? 0 : 1;
  return c;
}

void add_simple_cases(std::vector<Case>& cases) {
  cases.push_back({"one page", 1, 1, 128, 128, 64, 64, Lists::kBlocks});
  cases.push_back({"causal", 4, 1, 128, 128, 256, 256});
  cases.push_back(make_case("causal 8 heads", 4, 128, 333, 333, Lists::kCausal));
  cases.push_back(make_case("chunk", 4, 128, 70, 1000, Lists::kCausal));
  cases.push_back(make_case("long", 4, 128, 96, 6000, Lists::kCausal));
  cases.push_back(make_case("long", 4, 64, 96, 6000, Lists::kCausal));
  cases.push_back({"many heads", 8, 8, 64, 64, 2100, 2100});
  for (int dim : {64, 128}) {
    for (Lists lists : {Lists::kCausal, Lists::kBlocks, Lists::kSpans}) {
      Case many = make_case("many tiles", 4, dim, 1500, 1500, lists);
      many.num_sms = 3;
      cases.push_back(many);
    }
  }
  for (int64_t n : {1, 63, 64, 65, 127, 128, 129, 191, 193}) {
    cases.push_back(make_case("causal edge", 2, 128, std::min<int64_t>(n, 40), n, Lists::kCausal));
  }
}

void add_group_cases(std::vector<Case>& cases) {
  for (int group : {1, 2, 3, 4, 5, 8, 16, 32, 64}) {
    cases.push_back(make_case("group", group, 128, 150, 500, Lists::kBlocks));
    cases.push_back(make_case("group spans", group, 64, 150, 700, Lists::kSpans));
    Case head_lists = make_case("group head lists", group, 128, 150, 700, Lists::kSpans);
    head_lists.selection = 2;
    cases.push_back(head_lists);
    cases.push_back(make_case("scattered", group, 128, 150, 9000, Lists::kBlocks));
    Case row_query = make_case("row_query", group, 128, 100, 300, Lists::kSpans);
    row_query.row_query = true;
    cases.push_back(row_query);
  }
}

void add_dim_cases(std::vector<Case>& cases) {
  const int dims[][2] = {{64, 64}, {128, 128}, {192, 128}, {256, 256}};
  for (const auto& dim : dims) {
    for (DataType type : {DataType::kBFloat16, DataType::kFloat16}) {
      Case causal{"dims causal", 8, 2, dim[0], dim[1], 200, 777, Lists::kCausal, 0, type};
      cases.push_back(causal);
      Case spans{"dims spans", 8, 2, dim[0], dim[1], 200, 777, Lists::kSpans, 1, type, type};
      cases.push_back(spans);
      Case cap{"dims window, cap", 8, 2, dim[0], dim[1], 200, 777, Lists::kWindow, 0, type, type};
      cap.soft_cap = 20.0F;
      cases.push_back(cap);
      // Maxima that grow by more than what is let pass.
      Case peaks{"dims peaks", 8, 2, dim[0], dim[1], 200, 777, Lists::kCausal, 0, type};
      peaks.scale = 0.7F;
      cases.push_back(peaks);
    }
  }
}

// A value that is not finite, in tiles that are half full of rows that do not see it.
void add_value_cases(std::vector<Case>& cases) {
  for (Special special : {Special::kNanValue, Special::kInfiniteValue}) {
    for (int dim : {64, 128, 256}) {
      for (Lists lists : {Lists::kCausal, Lists::kSpans, Lists::kBlocks}) {
        const bool nan = special == Special::kNanValue;
        Case value = make_case(nan ? "NaN value" : "infinite value", 4, dim, 300, 300, lists);
        value.special = special;
        value.dtype = dim == 64 ? DataType::kFloat16 : DataType::kBFloat16;
        value.out_dtype = lists == Lists::kSpans ? value.dtype : DataType::kFloat32;
        cases.push_back(value);
      }
    }
  }
}

std::vector<Case> make_cases() {
  std::vector<Case> cases;
  add_simple_cases(cases);
  add_group_cases(cases);
  add_dim_cases(cases);
  cases.push_back({"one list", 8, 4, 128, 128, 300, 900, Lists::kSpans, 0});
  cases.push_back(make_case("empty", 4, 128, 100, 300, Lists::kEmpty));
  Case sections{"sections", 12, 6, 128, 128, 400, 500, Lists::kSpans, 1};
  sections.section_heads = 4;
  cases.push_back(sections);
  for (int dim : {64, 128}) {
    Case special = make_case("NaN query", 4, dim, 100, 300, Lists::kSpans);
    special.special = Special::kNanQuery;
    cases.push_back(special);
    special.name = "NaN key";
    special.special = Special::kNanKey;
    cases.push_back(special);
    special.name = "infinite key";
    special.special = Special::kInfiniteKey;
    cases.push_back(special);
    special.name = "infinite key, cap";
    special.soft_cap = 30.0F;
    cases.push_back(special);
  }
  add_value_cases(cases);
  return cases;
}

}  // namespace
}  // namespace longspan::cuda
