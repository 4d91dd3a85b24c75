// The checks of cuda_decode: probes of single tokens, which tell where a layout is wrong; chosen
// and random cases against a naive kernel in double precision, itself compared with the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "bench/cuda_decode_inputs.h"
#include "bench/cuda_decode_reference.h"

namespace longspan::cuda {
namespace {

bool launched(cudaError_t error) {
  if (!succeeded(error, "launch")) {
    return false;
  }
  const cudaError_t run_error = cudaDeviceSynchronize();
#ifdef LONGSPAN_CUDA_SPIN_LIMIT
  report_decode_spin();
  report_attend_pages_spin();
#endif
  return succeeded(run_error, "run");
}

bool accepted(const char* reason) {
  if (reason != nullptr) {
    std::printf("  declined: %s\n", reason);
  }
  return reason == nullptr;
}

// Runs the kernel under test. False if it declines or the device reports an error.
bool run(Setup& setup, const Device& device) {
  if (setup.test_case().as_pages) {
    AttendPagesArgs args = setup.pages_args();
    args.num_sms = device.num_sms;
    args.shared_memory_per_block = device.shared_memory;
    return accepted(attend_pages_declines(args)) &&
           launched(launch_attend_pages(args, device.stream));
  }
  DecodeArgs& args = setup.args();
  args.num_sms = device.num_sms;
  args.shared_memory_per_block = device.shared_memory;
  const Memory<std::byte> workspace(decode_workspace_bytes(args));
  args.workspace = workspace.data();
  return accepted(decode_declines(args)) && launched(launch_attend_decode(args, device.stream));
}

// The value row that an output equals, or -1: where a layout is wrong, it tells what was read
// instead.
int64_t matching_token(const std::vector<float>& values, int dim, const std::vector<float>& out) {
  const auto tokens = static_cast<int64_t>(values.size()) / dim;
  for (int64_t t = 0; t < tokens; ++t) {
    if (std::equal(out.begin(), out.end(), values.begin() + t * dim)) {
      return t;
    }
  }
  return -1;
}

// One page, one head. Every token alone: by a span of one token (a 16-row box), and by a key that
// outweighs all others of the page (a 64-row box). The output has to be that token's value, bit by
// bit.
bool probe_tokens(int key_dim, int value_dim, bool as_pages, const Device& device, Random& random) {
  Case c;
  c.as_pages = as_pages;
  c.num_query_heads = 1;
  c.num_kv_heads = 1;
  c.key_dim = key_dim;
  c.value_dim = value_dim;
  c.num_tokens = kPageTokens;
  Setup setup(c, random);
  const PagedView view = setup.view(0);
  const std::vector<std::byte> arena = setup.arena();
  const std::vector<const std::byte*> pages = setup.pages();
  const std::byte* page = arena.data() + (pages[0] - setup.args().params.kv.arena);
  std::vector<float> values;
  for (int i = 0; i < kPageTokens * value_dim; ++i) {
    values.push_back(
        load_element(c.kv_dtype, page + view.value_offset_bytes(), static_cast<size_t>(i)));
  }
  int bad = 0;
  for (const bool whole_page : {false, true}) {
    for (int64_t token = 0; token < kPageTokens; ++token) {
      setup.set_list(whole_page ? Span{0, kPageTokens} : Span{token, token + 1});
      std::vector<uint16_t> query(static_cast<size_t>(key_dim));
      for (int d = 0; d < key_dim;
           ++d) {  // along the token's key, so that its logit is the largest
        query[static_cast<size_t>(d)] = float_to_bfloat16(
            (whole_page ? 64.0F : 1.0F) *
            load_element(c.kv_dtype, page, static_cast<size_t>(token * key_dim + d)));
      }
      cudaMemcpy(const_cast<float*>(setup.args().params.query),
                 query.data(),
                 query.size() * 2,
                 cudaMemcpyHostToDevice);
      if (!run(setup, device)) {
        return false;
      }
      const std::vector<std::byte> bytes = setup.out();
      std::vector<float> out(static_cast<size_t>(value_dim));
      std::memcpy(out.data(), bytes.data(), bytes.size());
      const int64_t found = matching_token(values, value_dim, out);
      if (found != token && bad++ < 4) {
        std::printf(
            "  %s, token %ld: out is value row %ld; out[0..3] %g %g %g %g, expected %g %g %g %g\n",
            whole_page ? "whole page" : "one token",
            static_cast<long>(token),
            static_cast<long>(found),
            out[0],
            out[1],
            out[2],
            out[3],
            values[static_cast<size_t>(token * value_dim)],
            values[static_cast<size_t>(token * value_dim + 1)],
            values[static_cast<size_t>(token * value_dim + 2)],
            values[static_cast<size_t>(token * value_dim + 3)]);
      }
    }
  }
  return bad == 0;
}

bool check_case(const Case& c, const Device& device, Random& random) {
  Setup setup(c, random);
  if (!run(setup, device)) {
    return false;
  }
  const Expected expected = reference(setup);
  const Verdict verdict = compare(setup, expected);
  std::printf("  out error %.2e, lse error %.1e", verdict.worst_out, verdict.worst_lse);
  if (!verdict.ok) {
    std::printf(", %ld bad rows; first: %s",
                static_cast<long>(verdict.num_bad_rows),
                verdict.first.c_str());
  }
  std::printf("\n");
  constexpr size_t kHostArenaBytes = size_t{8} << 20;
  const bool reference_ok =
      setup.arena_bytes() > kHostArenaBytes || reference_is_right(setup, expected);
  return verdict.ok && reference_ok;
}

// Elements that are not finite, in keys and values that some rows see and others do not.
bool check_poison(float poison,
                  bool in_keys,
                  DataType query_dtype,
                  bool as_pages,
                  const Device& device,
                  Random& random) {
  Case c;
  c.as_pages = as_pages;
  c.num_rows = 4;
  c.num_tokens = 500;
  c.query_dtype = query_dtype;
  c.lists = Lists::kSpans;
  Setup setup(c, random);
  const PagedView view = setup.view(0);
  for (const int64_t token : {7, 133, 260, 261, 450}) {
    set_element<<<1, 1>>>(view, token, 1, in_keys ? 3 : c.key_dim + 70, poison);
  }
  cudaDeviceSynchronize();
  if (!run(setup, device)) {
    return false;
  }
  const Verdict verdict = compare(setup, reference(setup));
  if (!verdict.ok) {
    std::printf("  %ld bad rows; first: %s\n",
                static_cast<long>(verdict.num_bad_rows),
                verdict.first.c_str());
  }
  return verdict.ok;
}

// Logits of -inf alone: an empty row.
bool check_no_weight(bool as_pages, const Device& device, Random& random) {
  Case c;
  c.as_pages = as_pages;
  c.num_query_heads = 2;
  c.num_kv_heads = 1;
  c.num_tokens = 200;
  Setup setup(c, random);
  const std::vector<uint16_t> query(static_cast<size_t>(4 * c.key_dim), float_to_bfloat16(1.0F));
  cudaMemcpy(const_cast<float*>(setup.args().params.query),
             query.data(),
             query.size() * 2,
             cudaMemcpyHostToDevice);
  for (int64_t token = 0; token < c.num_tokens; ++token) {
    set_element<<<1, 1>>>(setup.view(0), token, 0, 5, -static_cast<float>(kInfinity));
  }
  cudaDeviceSynchronize();
  return run(setup, device) && compare(setup, reference(setup)).ok && setup.lse()[0] == -kInfinity;
}

Case random_case(Random& random) {
  const auto choose = [&](const std::vector<int>& values) {
    return values[static_cast<size_t>(pick(random, 0, static_cast<int64_t>(values.size()) - 1))];
  };
  Case c;
  c.num_kv_heads = choose({1, 2, 3, 8});
  c.key_dim = choose({64, 128, 128, 192, 256});
  const int group =
      std::min(choose({1, 2, 3, 4, 4, 8, 12, 16, 24, 32}), c.key_dim == 256 ? 16 : 32);
  c.num_query_heads = group * c.num_kv_heads;
  c.value_dim = c.key_dim == 192 ? 128 : c.key_dim;
  c.num_rows = choose({1, 1, 2, 3, 4, 9});
  c.kv_dtype = choose({0, 1}) == 0 ? DataType::kBFloat16 : DataType::kFloat16;
  c.query_dtype = choose({0, 1}) == 0 ? c.kv_dtype : DataType::kFloat32;
  const DataType out_types[] = {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16};
  c.out_dtype = out_types[choose({0, 0, 1, 2})];
  c.num_selection_heads = choose({1, c.num_kv_heads, c.num_query_heads});
  c.lists = static_cast<Lists>(pick(random, 0, 6));
  c.num_tokens =
      choose({1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 1023, 4097, 12345, 70000});
  constexpr int64_t kMaxTokenHeads = 3'000'000;  // for the naive kernel's time
  c.num_tokens = std::min(c.num_tokens, kMaxTokenHeads / (c.num_rows * c.num_query_heads));
  c.contexts_of_rows = choose({0, 0, 1}) == 1;
  c.row_query = choose({0, 1}) == 1;
  c.soft_cap = choose({0, 0, 0, 1}) == 1 ? 20.0F : 0.0F;
  c.max_cluster_size = choose({1, 2, 4, 8, 16, 16});
  return c;
}

std::vector<Case> chosen_cases() {
  std::vector<Case> cases;
  const auto add = [&](auto change) {
    Case c;
    c.num_tokens = 1000;
    change(c);
    cases.push_back(c);
  };
  add([](Case& c) { c.num_tokens = 64; });
  add([](Case& c) { c.num_tokens = 128; });
  for (const int group : {1, 2, 3, 4, 8, 12, 16, 24, 32}) {
    add([&](Case& c) { c.num_query_heads = group, c.num_kv_heads = 1; });
  }
  for (const int dim : {64, 192, 256}) {
    for (const Lists lists : {Lists::kDense, Lists::kSpans}) {
      add([&](Case& c) { c.key_dim = dim, c.value_dim = dim == 192 ? 128 : dim, c.lists = lists; });
    }
  }
  for (int lists = 0; lists <= 6; ++lists) {
    add([&](Case& c) { c.lists = static_cast<Lists>(lists), c.num_tokens = 5001; });
  }
  add([](Case& c) { c.kv_dtype = c.query_dtype = DataType::kFloat16; });
  add([](Case& c) { c.query_dtype = DataType::kFloat32; });
  add([](Case& c) { c.out_dtype = DataType::kBFloat16, c.soft_cap = 20.0F; });
  add([](Case& c) { c.num_selection_heads = 2, c.lists = Lists::kBlocks64; });
  add([](Case& c) { c.num_selection_heads = 8, c.lists = Lists::kBlocks16; });
  add([](Case& c) { c.num_rows = 9, c.row_query = true, c.lists = Lists::kSomeEmpty; });
  add([](Case& c) { c.num_rows = 70, c.contexts_of_rows = true; });  // lists counted by kernels
  add([](Case& c) {
    c.num_rows = 1500, c.lists = Lists::kSomeEmpty;
    c.num_selection_heads = 2;
  });
  add([](Case& c) { c.num_tokens = 70001, c.num_query_heads = 32, c.num_kv_heads = 8; });
  add([](Case& c) { c.num_tokens = 70000, c.num_rows = 6, c.contexts_of_rows = true; });
  const size_t num_cases = cases.size();
  for (size_t i = 0; i < num_cases; ++i) {
    cases.push_back(cases[i]);
    cases.back().as_pages = true;
  }
  for (const int cluster_size : {1, 2, 4, 8}) {
    add([&](Case& c) { c.as_pages = true, c.max_cluster_size = cluster_size; });
  }
  return cases;
}

struct Check {
  std::string name;
  std::function<bool(const Device&, Random&)> run;
};

void add_poison_checks(bool as_pages, std::vector<Check>& checks) {
  for (const double poison : {std::nan(""), kInfinity, -kInfinity}) {
    for (const bool in_keys : {true, false}) {
      for (const DataType query : {DataType::kBFloat16, DataType::kFloat32}) {
        checks.push_back(
            {"poison " + std::to_string(poison) + (in_keys ? " in keys" : " in values") +
                 " query " + std::string(to_string(query)) + (as_pages ? ", pages" : ""),
             [=](const Device& device, Random& random) {
               return check_poison(
                   static_cast<float>(poison), in_keys, query, as_pages, device, random);
             }});
      }
    }
  }
}

std::vector<Check> make_checks(uint64_t seed) {
  std::vector<Check> checks;
  const auto add_case = [&](const Case& c) {
    checks.push_back({describe(c), [c](const Device& device, Random& random) {
                        return check_case(c, device, random);
                      }});
  };
  for (const bool as_pages : {false, true}) {
    const std::string suffix = as_pages ? ", pages" : "";
    for (const int dim : {64, 128, 192, 256}) {
      checks.push_back(
          {"probe d " + std::to_string(dim) + suffix, [=](const Device& device, Random& random) {
             const int value_dim = dim == 192 ? 128 : dim;
             return probe_tokens(dim, value_dim, as_pages, device, random);
           }});
    }
    add_poison_checks(as_pages, checks);
    checks.push_back({"logits of -inf" + suffix, [=](const Device& device, Random& random) {
                        return check_no_weight(as_pages, device, random);
                      }});
  }
  for (const Case& c : chosen_cases()) {
    add_case(c);
  }
  constexpr int kRandomCases = 140;
  Random random(seed);
  for (int i = 0; i < kRandomCases; ++i) {
    Case c = random_case(random);
    c.as_pages = i % 2 == 1;
    add_case(c);
  }
  return checks;
}

}  // namespace
}  // namespace longspan::cuda
