// The cases of the sparse decode step: sizes around the borders of pages, batches and clusters,
// forced tokens of every kind, scores that tie, and the shapes that are timed.
#include "bench/cuda_sparse_cases.h"

#include <algorithm>
#include <cstdio>

namespace longspan::cuda {
namespace {

void add_sizes(std::vector<SparseCase>& cases) {
  for (const int64_t tokens : {0, 1, 63, 64, 65, 129, 1000, 4097, 10000, 70000}) {
    for (const int dim : {64, 128}) {
      for (const int group : {4, 16}) {
        cases.push_back(make_sparse_case("sizes", 2 * group, 2, dim, tokens, 20));
      }
    }
  }
  for (const int group : {1, 2, 3, 5, 7, 8, 9, 13}) {
    SparseCase c = make_sparse_case("groups", 2 * group, 2, 128, 9000, 16);
    c.shape.search.query_dtype = group % 2 == 0 ? DataType::kBFloat16 : DataType::kFloat32;
    cases.push_back(c);
  }
  for (const int64_t k : {0, 1, 31, 64, 65, 128, 200, 256}) {
    SparseCase c = make_sparse_case("k", 8, 2, 128, 60000, k);
    cases.push_back(c);
    c.shape.search.dim = 64;
    c.shape.search.dtype = DataType::kFloat16;
    c.num_sms = 20;
    cases.push_back(c);
  }
  for (const int size : {2, 4, 8}) {
    for (const int group : {4, 16}) {
      SparseCase c = make_sparse_case("clusters", 2 * group, 2, 128, 50000, 32);
      c.max_cluster_size = size;
      cases.push_back(c);
      c.shape.search.dim = 64;
      c.shape.forced.window_tokens = 700;
      cases.push_back(c);
    }
  }
  for (const int64_t rows : {2, 5}) {
    SparseCase c = make_sparse_case("rows", 8, 2, 64, 12000, 24);
    c.shape.search.num_rows = rows;
    cases.push_back(c);
  }
}

void add_forced(std::vector<SparseCase>& cases) {
  for (const bool overlap : {false, true}) {
    for (const ForcedTokens& forced : {ForcedTokens{1, 2, 0, 0},
                                       ForcedTokens{0, 0, 0, 0},
                                       ForcedTokens{0, 1, 513, 4},
                                       ForcedTokens{2, 3, 64, 200},
                                       ForcedTokens{0, 0, 1, 1},
                                       ForcedTokens{100, 100, 0, 0},
                                       ForcedTokens{0, 0, 20000, 10}}) {
      SparseCase c = make_sparse_case("forced", 8, 2, 128, 11111, 40);
      c.shape.forced = forced;
      c.overlap = overlap;
      cases.push_back(c);
      c.num_tokens = 300;
      cases.push_back(c);
    }
  }
}

void add_kinds(std::vector<SparseCase>& cases) {
  for (const SparseNumbers numbers : {SparseNumbers::kWhole,
                                      SparseNumbers::kEqual,
                                      SparseNumbers::kHotPage,
                                      SparseNumbers::kSpecial}) {
    for (const QueryForm form :
         {QueryForm::kGroupMean, QueryForm::kGroupSum, QueryForm::kEachHead}) {
      for (const int64_t tokens : {3000, 100000}) {
        SparseCase c = make_sparse_case("scores", 8, 2, 64, tokens, 30);
        c.numbers = numbers;
        c.shape.search.query_form = form;
        c.shape.search.divisor = form == QueryForm::kGroupSum ? 4.0F : 1.0F;
        cases.push_back(c);
      }
    }
  }
  for (const DataType dtype : {DataType::kBFloat16, DataType::kFloat16}) {
    for (const DataType query : {DataType::kFloat32, dtype}) {
      for (const DataType out : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        SparseCase c = make_sparse_case("types", 16, 2, 128, 5000, 16);
        c.shape.search.dtype = dtype;
        c.shape.search.query_dtype = query;
        c.shape.attention_query_dtype = query;
        c.out_dtype = out;
        c.soft_cap = out == DataType::kFloat32 ? 5.0F : 0.0F;
        cases.push_back(c);
      }
    }
  }
  SparseCase search = make_sparse_case("search alone", 8, 2, 128, 20000, 64);
  search.shape.attends = false;
  cases.push_back(search);
}

// The shapes that are timed.
void add_real(std::vector<SparseCase>& cases) {
  for (const int64_t tokens : {int64_t{1} << 17, int64_t{1} << 20}) {
    for (const int kv_heads : {8, 4}) {
      SparseCase c = make_sparse_case("real", kv_heads == 8 ? 32 : 64, kv_heads, 128, tokens, 64);
      c.arena_pages = 64;
      c.shape.search.query_dtype = DataType::kBFloat16;
      c.shape.attention_query_dtype = DataType::kBFloat16;
      c.out_dtype = DataType::kBFloat16;
      cases.push_back(c);
    }
  }
  SparseCase c = make_sparse_case("real", 8, 2, 128, 10 << 20, 64);
  c.arena_pages = 64;
  cases.push_back(c);
}

}  // namespace

SparseCase make_sparse_case(const std::string& name,
                            int query_heads,
                            int kv_heads,
                            int dim,
                            int64_t num_tokens,
                            int64_t k) {
  SparseCase c;
  c.name = name;
  SearchShape& search = c.shape.search;
  search.num_rows = 1;
  search.num_query_heads = query_heads;
  search.num_kv_heads = kv_heads;
  search.dim = dim;
  search.max_k = k;
  search.query_form = QueryForm::kGroupMean;
  c.shape.forced = {1, 2, 0, 0};
  c.num_tokens = num_tokens;
  return c;
}

std::string describe(const SparseCase& c) {
  static const char* const kNumbers[] = {"normal", "whole", "equal", "hot page", "special"};
  static const char* const kForms[] = {"each head", "group sum", "group mean", "all mean"};
  const SearchShape& s = c.shape.search;
  const ForcedTokens& forced = c.shape.forced;
  char text[320];
  std::snprintf(
      text,
      sizeof(text),
      "%s: %lld rows, heads %d/%d, d %d, %lld tokens, k %lld, %s query %s out %s, %s, %s, "
      "forced %d+%d blocks %lld+%lld tokens%s, at most %d of %d",
      c.name.c_str(),
      static_cast<long long>(s.num_rows),
      s.num_query_heads,
      s.num_kv_heads,
      s.dim,
      static_cast<long long>(c.num_tokens),
      static_cast<long long>(s.max_k),
      std::string(to_string(s.dtype)).c_str(),
      std::string(to_string(s.query_dtype)).c_str(),
      std::string(to_string(c.out_dtype)).c_str(),
      kForms[static_cast<int>(s.query_form)],
      kNumbers[static_cast<int>(c.numbers)],
      forced.first_blocks,
      forced.last_blocks,
      static_cast<long long>(forced.sink_tokens),
      static_cast<long long>(forced.window_tokens),
      c.overlap ? " overlapping" : "",
      c.max_cluster_size,
      c.num_sms);
  return text;
}

std::vector<SparseCase> all_sparse_cases() {
  std::vector<SparseCase> cases;
  add_sizes(cases);
  add_forced(cases);
  add_kinds(cases);
  add_real(cases);
  return cases;
}

}  // namespace longspan::cuda
