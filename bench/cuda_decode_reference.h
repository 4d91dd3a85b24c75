// The double-precision reference of cuda_decode, and how results are compared with it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "bench/cuda_decode_inputs.h"

namespace longspan::cuda {
namespace {

constexpr int kReferenceThreads = 256;

__device__ double reference_logit(
    const AttendParams& params, const PagedView& view, int64_t query_row, int head, int64_t token) {
  const int kv_head = head * view.num_kv_heads / params.num_query_heads;
  const std::byte* key = view.key(token, kv_head);
  const int64_t query = (query_row * params.num_query_heads + head) * view.key_dim;
  double dot = 0.0;
  for (int d = 0; d < view.key_dim; ++d) {
    dot += static_cast<double>(load_as_float(params.query_dtype, params.query, query + d)) *
           load_as_float(view.dtype, key, d);
  }
  const double scaled = dot * params.scale;
  return params.soft_cap > 0.0F ? params.soft_cap * tanh(scaled / params.soft_cap) : scaled;
}

// A block for each row and head; spans one after the other.
__global__ void reference_kernel(const AttendParams params,
                                 const std::byte* const* const* row_pages,
                                 double* out,
                                 double* lse) {
  __shared__ double weights[kReferenceThreads];
  __shared__ double shared_max[kReferenceThreads];
  __shared__ int has_nan;
  const int64_t row = blockIdx.x / params.num_query_heads;
  const int head = static_cast<int>(blockIdx.x % params.num_query_heads);
  const int kv_head = head * params.kv.num_kv_heads / params.num_query_heads;
  const int64_t query_row = params.row_query == nullptr ? row : params.row_query[row];
  PagedView view = params.kv;
  if (row_pages != nullptr) {
    view.pages = row_pages[row];
  }
  const int64_t list = row * params.num_selection_heads + static_cast<int64_t>(head) *
                                                              params.num_selection_heads /
                                                              params.num_query_heads;
  const int thread = threadIdx.x;
  if (thread == 0) {
    has_nan = 0;
  }
  __syncthreads();
  double maximum = -kInfinity;
  for (int64_t i = params.span_offsets[list]; i < params.span_offsets[list + 1]; ++i) {
    for (int64_t t = params.spans[i].begin + thread; t < params.spans[i].end;
         t += kReferenceThreads) {
      const double logit = reference_logit(params, view, query_row, head, t);
      maximum = fmax(maximum, logit);
      if (isnan(logit)) {
        has_nan = 1;
      }
    }
  }
  shared_max[thread] = maximum;
  __syncthreads();
  for (int i = 0; i < kReferenceThreads; ++i) {
    maximum = fmax(maximum, shared_max[i]);
  }
  const bool empty = maximum == -kInfinity && has_nan == 0;
  double total = 0.0;
  double sum = 0.0;  // of channel `thread`
  for (int64_t i = params.span_offsets[list]; i < params.span_offsets[list + 1] && !empty; ++i) {
    for (int64_t first = params.spans[i].begin; first < params.spans[i].end;
         first += kReferenceThreads) {
      const auto count = static_cast<int>(
          min(params.spans[i].end - first, static_cast<int64_t>(kReferenceThreads)));
      __syncthreads();
      weights[thread] =
          thread < count
              ? exp(reference_logit(params, view, query_row, head, first + thread) - maximum)
              : 0.0;
      __syncthreads();
      for (int j = 0; j < count; ++j) {
        total += weights[j];
        if (thread < view.value_dim) {
          sum += weights[j] * load_as_float(view.dtype, view.value(first + j, kv_head), thread);
        }
      }
    }
  }
  const int64_t out_row = row * params.num_query_heads + head;
  if (thread < view.value_dim) {
    out[out_row * view.value_dim + thread] = empty ? 0.0 : sum / total;
  }
  if (thread == 0) {
    lse[out_row] = empty ? maximum : maximum + log(total);
  }
}

// ---- Comparison ----

struct Tolerance {
  double out;  // of ||out - expected|| / ||expected||
  double lse;
};

Tolerance tolerance(const Case& c) {
  const double cache = c.kv_dtype == DataType::kFloat16 ? 2e-3 : 4e-3;
  const double rounding = c.out_dtype == DataType::kBFloat16  ? 2.5e-3
                          : c.out_dtype == DataType::kFloat16 ? 5e-4
                                                              : 0.0;
  return {cache + rounding, 1e-3};
}

// Whether both are NaN, or the same infinity, or both finite.
bool same_kind(double got, double expected) {
  if (std::isnan(got) || std::isnan(expected)) {
    return std::isnan(got) && std::isnan(expected);
  }
  return (std::isfinite(got) && std::isfinite(expected)) || got == expected;
}

struct Verdict {
  bool ok = true;
  int64_t num_bad_rows = 0;
  double worst_out = 0.0;
  double worst_lse = 0.0;
  std::string first;  // the first bad row
};

void compare_row(const Case& c,
                 int64_t row,
                 const std::vector<std::byte>& out,
                 float lse,
                 const double* expected,
                 double expected_lse,
                 Verdict& verdict) {
  double error = 0.0;
  double norm = 0.0;
  int worst_channel = -1;
  double worst = -1.0;
  for (int e = 0; e < c.value_dim; ++e) {
    const size_t index =
        static_cast<size_t>(row) * static_cast<size_t>(c.value_dim) + static_cast<size_t>(e);
    const double got = load_element(c.out_dtype, out.data(), index);
    double difference = std::fabs(got - expected[e]);
    if (!same_kind(got, expected[e])) {
      difference = kInfinity;
    } else if (!std::isfinite(got)) {
      difference = 0.0;
    } else {
      norm += expected[e] * expected[e];
      error += difference * difference;
    }
    if (difference > worst) {
      worst = difference;
      worst_channel = e;
    }
  }
  const double relative = worst == kInfinity ? kInfinity
                          : error == 0.0     ? 0.0
                                             : std::sqrt(error / norm);
  const double lse_error = !same_kind(lse, expected_lse) ? kInfinity
                           : std::isfinite(expected_lse) ? std::fabs(lse - expected_lse)
                                                         : 0.0;
  verdict.worst_out = std::max(verdict.worst_out, relative);
  verdict.worst_lse = std::max(verdict.worst_lse, lse_error);
  const Tolerance allowed = tolerance(c);
  if (relative <= allowed.out && lse_error <= allowed.lse) {
    return;
  }
  verdict.ok = false;
  if (verdict.num_bad_rows++ == 0) {
    char text[256];
    std::snprintf(
        text,
        sizeof(text),
        "row %ld head %ld: lse %.6g expected %.6g; out error %.3g, worst channel %d: "
        "%.6g expected %.6g",
        static_cast<long>(row / c.num_query_heads),
        static_cast<long>(row % c.num_query_heads),
        static_cast<double>(lse),
        expected_lse,
        relative,
        worst_channel,
        static_cast<double>(load_element(
            c.out_dtype, out.data(), static_cast<size_t>(row * c.value_dim + worst_channel))),
        expected[worst_channel]);
    verdict.first = text;
  }
}

struct Expected {
  std::vector<double> out;
  std::vector<double> lse;
};

Expected reference(const Setup& setup) {
  const AttendParams& params = setup.args().params;
  const auto rows =
      static_cast<size_t>(params.num_rows) * static_cast<size_t>(params.num_query_heads);
  const Memory<double> out(rows * static_cast<size_t>(params.kv.value_dim));
  const Memory<double> lse(rows);
  reference_kernel<<<static_cast<unsigned>(rows), kReferenceThreads>>>(
      params, setup.args().row_pages, out.data(), lse.data());
  succeeded(cudaDeviceSynchronize(), "reference");
  return {out.host(), lse.host()};
}

Verdict compare(const Setup& setup, const Expected& expected) {
  const Case& c = setup.test_case();
  const std::vector<std::byte> out = setup.out();
  const std::vector<float> lse = setup.lse();
  Verdict verdict;
  for (size_t row = 0; row < lse.size(); ++row) {
    compare_row(c,
                static_cast<int64_t>(row),
                out,
                lse[row],
                expected.out.data() + row * static_cast<size_t>(c.value_dim),
                expected.lse[row],
                verdict);
  }
  return verdict;
}

// The naive kernel's first and last row against the host.
bool reference_is_right(const Setup& setup, const Expected& expected) {
  const Case& c = setup.test_case();
  const std::vector<std::byte> arena = setup.arena();
  const std::vector<std::byte> query = setup.query();
  const std::vector<const std::byte*> pages = setup.pages();
  const AttendParams& params = setup.args().params;
  bool ok = true;
  for (const int row : {0, c.num_rows - 1}) {
    const int head = row == 0 ? 0 : c.num_query_heads - 1;
    PagedView view = setup.view(row);
    std::vector<const std::byte*> host_pages;
    for (int64_t i = 0; i < (view.num_entries + 63) / 64; ++i) {
      const std::byte* page = pages[static_cast<size_t>(setup.first_page(row) + i)];
      host_pages.push_back(arena.data() + (page - params.kv.arena));
    }
    view.pages = host_pages.data();
    const int kv_head = head * c.num_kv_heads / c.num_query_heads;
    const auto list = static_cast<size_t>(row * c.num_selection_heads +
                                          head * c.num_selection_heads / c.num_query_heads);
    const auto query_row = static_cast<size_t>(c.row_query ? c.num_rows - row : row);
    double total = 0.0;
    double first_channel = 0.0;
    for (int64_t i = setup.offsets()[list]; i < setup.offsets()[list + 1]; ++i) {
      const Span span = setup.spans()[static_cast<size_t>(i)];
      for (int64_t t = span.begin; t < span.end; ++t) {
        double dot = 0.0;
        for (int d = 0; d < c.key_dim; ++d) {
          const size_t index =
              (query_row * static_cast<size_t>(c.num_query_heads) + static_cast<size_t>(head)) *
                  static_cast<size_t>(c.key_dim) +
              static_cast<size_t>(d);
          dot += static_cast<double>(load_element(c.query_dtype, query.data(), index)) *
                 load_element(c.kv_dtype, view.key(t, kv_head), static_cast<size_t>(d));
        }
        double logit = dot * params.scale;
        if (c.soft_cap > 0) {
          logit = c.soft_cap * std::tanh(logit / c.soft_cap);
        }
        total += std::exp(logit);
        first_channel += std::exp(logit) * load_element(c.kv_dtype, view.value(t, kv_head), 0);
      }
    }
    const auto out_row = static_cast<size_t>(row * c.num_query_heads + head);
    const double lse = std::log(total);
    const double out = total == 0.0 ? 0.0 : first_channel / total;
    const double got = expected.out[out_row * static_cast<size_t>(c.value_dim)];
    const bool same =
        (lse == expected.lse[out_row] || std::fabs(lse - expected.lse[out_row]) < 1e-6) &&
        std::fabs(out - got) < 1e-6;
    if (!same) {
      std::printf(
          "  the naive kernel is wrong: row %d head %d lse %.9g host %.9g, out[0] %.9g host %.9g\n",
          row,
          head,
          expected.lse[out_row],
          lse,
          got,
          out);
    }
    ok = ok && same;
  }
  return ok;
}

}  // namespace
}  // namespace longspan::cuda
