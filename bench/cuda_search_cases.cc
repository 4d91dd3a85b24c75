// The cases of the search: every reduction, sizes around the borders of tiles and pages, and the
// shapes that are timed.
#include "bench/cuda_search_cases.h"

#include <cstdio>

namespace longspan::cuda {
namespace {

bool over_all_heads(HeadReduce reduce) {
  return reduce == HeadReduce::kAllSum || reduce == HeadReduce::kAllMean ||
         reduce == HeadReduce::kAllMax;
}
bool is_maximum(HeadReduce reduce) {
  return reduce == HeadReduce::kGroupMax || reduce == HeadReduce::kAllMax;
}
bool is_mean(HeadReduce reduce) {
  return reduce == HeadReduce::kGroupMean || reduce == HeadReduce::kAllMean;
}

constexpr HeadReduce kHeadReduces[] = {HeadReduce::kNone,
                                       HeadReduce::kGroupSum,
                                       HeadReduce::kGroupMean,
                                       HeadReduce::kGroupMax,
                                       HeadReduce::kAllSum,
                                       HeadReduce::kAllMean,
                                       HeadReduce::kAllMax};

void add_reductions(std::vector<Case>& cases) {
  int round = 0;
  for (const ScoreForm score : {ScoreForm::kDot, ScoreForm::kBound}) {
    for (const QueryReduce query :
         {QueryReduce::kNone, QueryReduce::kGroupMean, QueryReduce::kAllMean}) {
      for (const HeadReduce head : kHeadReduces) {
        for (const Numbers numbers : {Numbers::kWhole, Numbers::kNormal}) {
          Case c = make_case("reductions", 8, 2, 64, 150);
          c.shape.num_rows = 7;
          c.shape.score = score;
          c.shape.dtype = round++ % 3 == 0 ? DataType::kFloat16 : DataType::kBFloat16;
          c.reductions = {query, head};
          c.numbers = numbers;
          cases.push_back(c);
        }
      }
    }
    for (const HeadReduce head : kHeadReduces) {
      Case c = make_case("not finite", 6, 2, 64, 200);
      c.shape.num_rows = 3;
      c.shape.score = score;
      c.shape.max_k = 200;
      c.reductions.head = head;
      c.numbers = Numbers::kSpecial;
      cases.push_back(c);
    }
  }
}

void add_sizes(std::vector<Case>& cases) {
  for (const int dim : {64, 128, 192, 256}) {
    for (const int64_t entries : {0, 1, 31, 33, 64, 65, 300, 1025, 3000}) {
      Case c = make_case("sizes", 5, 1, dim, entries);
      c.shape.num_rows = entries % 2 == 0 ? 3 : 1;
      c.shape.score = entries % 3 == 0 ? ScoreForm::kBound : ScoreForm::kDot;
      c.numbers = Numbers::kWhole;
      cases.push_back(c);
      c.numbers = Numbers::kNormal;
      c.shape.query_dtype = DataType::kBFloat16;
      c.reductions.query = QueryReduce::kGroupMean;
      c.shape.num_rows = 1;
      cases.push_back(c);
    }
  }
  for (const int64_t k : {1, 32, 33, 64, 65, 128, 129, 256}) {
    Case c = make_case("lengths of lists", 4, 2, 64, 5000);
    c.shape.num_rows = 2;
    c.shape.max_k = k;
    c.num_sms = k % 2 == 0 ? 132 : 4;
    c.numbers = Numbers::kWhole;
    cases.push_back(c);
    c.reductions.query = QueryReduce::kGroupMean;
    c.numbers = Numbers::kNormal;
    cases.push_back(c);
  }
  for (const int heads : {16, 17, 24, 40}) {
    Case c = make_case("large groups", heads, 1, 64, 500);
    c.shape.num_rows = 2;
    cases.push_back(c);
    c.reductions.head = HeadReduce::kGroupMax;
    cases.push_back(c);
  }
  for (const int64_t rows : {2, 5, 9, 17, 33}) {
    Case c = make_case("rows", 8, 2, 128, 700);
    c.shape.num_rows = rows;
    c.causal = true;
    c.reductions.query = QueryReduce::kGroupMean;
    c.num_sms = 1000;
    cases.push_back(c);
  }
}

void add_prefill(std::vector<Case>& cases) {
  for (const int64_t entries : {0, 1, 63, 64, 65, 300, 1000}) {
    for (const int dim : {64, 128}) {
      for (const int64_t k : {16, 64, 128}) {
        Case c = make_case("prefill", 8, 2, dim, entries);
        c.num_sms = 1;
        c.shape.num_rows = 100;
        c.shape.max_k = k;
        c.causal = entries % 2 == 0;
        c.reductions.query = QueryReduce::kGroupMean;
        cases.push_back(c);
        c.reductions = {};
        c.shape.query_dtype = k == 64 ? DataType::kFloat16 : DataType::kBFloat16;
        c.numbers = k == 16 ? Numbers::kWhole : Numbers::kNormal;
        cases.push_back(c);
        c.numbers = Numbers::kFew;
        cases.push_back(c);
      }
    }
  }
  for (const DataType dtype : {DataType::kFloat16, DataType::kBFloat16}) {
    for (const DataType query_dtype :
         {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
      for (const HeadReduce head :
           {HeadReduce::kNone, HeadReduce::kGroupSum, HeadReduce::kGroupMean}) {
        for (const Numbers numbers : {Numbers::kNormal, Numbers::kWhole, Numbers::kSpecial}) {
          Case c = make_case("prefill types", 6, 2, 64, 200);
          c.num_sms = 1;
          c.shape.num_rows = 70;
          c.shape.max_k = 30;
          c.shape.dtype = dtype;
          c.shape.query_dtype = query_dtype;
          c.reductions.head = head;
          c.numbers = numbers;
          cases.push_back(c);
        }
      }
    }
  }
  Case odd = make_case("prefill, odd group", 5, 1, 128, 130);
  odd.num_sms = 1;
  odd.shape.num_rows = 40;
  cases.push_back(odd);
}

// The shapes that are timed, as they are planned on the device.
void add_real(std::vector<Case>& cases) {
  for (const int kv_heads : {8, 4, 2}) {
    Case c = make_case("one million tokens", kv_heads == 4 ? 64 : 32, kv_heads, 128, 16384);
    c.shape.max_k = 64;
    c.num_sms = 132;
    c.reductions.query = QueryReduce::kGroupMean;
    cases.push_back(c);
    c.shape.query_dtype = DataType::kBFloat16;
    c.reductions = {QueryReduce::kNone, HeadReduce::kGroupSum};
    c.shape.score = ScoreForm::kBound;
    cases.push_back(c);
    c.shape.score = ScoreForm::kDot;
    c.reductions = {};
    cases.push_back(c);
  }
  Case c = make_case("ten million tokens", 8, 2, 128, 163840);
  c.num_sms = 132;
  c.shape.max_k = 16;
  c.reductions.query = QueryReduce::kGroupMean;
  cases.push_back(c);
}

}  // namespace

void set_reductions(const Reductions& reductions, SearchShape& shape) {
  const bool reduced = reductions.query != QueryReduce::kNone;
  const bool joined = reductions.head != HeadReduce::kNone;
  const bool all = over_all_heads(reductions.head);
  if (reduced) {
    shape.query_form =
        reductions.query == QueryReduce::kGroupMean ? QueryForm::kGroupMean : QueryForm::kAllMean;
  } else if (joined && !is_maximum(reductions.head)) {
    shape.query_form = QueryForm::kGroupSum;
  }
  shape.join_all_heads = all;
  if (is_maximum(reductions.head) && (all || !reduced)) {
    shape.join = ScoreJoin::kMax;
  } else if (all) {
    shape.join = ScoreJoin::kSum;
  }
  if (is_mean(reductions.head)) {
    const int heads = reduced ? shape.num_kv_heads : shape.num_query_heads;
    shape.divisor = static_cast<float>(all ? heads : heads / shape.num_kv_heads);
  }
}

Case make_case(const std::string& name, int query_heads, int kv_heads, int dim, int64_t entries) {
  Case c;
  c.name = name;
  c.shape.num_rows = 1;
  c.shape.num_query_heads = query_heads;
  c.shape.num_kv_heads = kv_heads;
  c.shape.dim = dim;
  c.shape.num_entries = entries;
  c.shape.max_k = 20;
  return c;
}

std::string describe(const Case& c) {
  static const char* const kQuery[] = {"each", "group mean", "all mean"};
  static const char* const kHead[] = {
      "none", "group sum", "group mean", "group max", "all sum", "all mean", "all max"};
  static const char* const kNumbers[] = {"normal", "whole", "special", "few"};
  const SearchShape& s = c.shape;
  char text[256];
  std::snprintf(
      text,
      sizeof(text),
      "%s: %lld rows, heads %d/%d, d %d, %lld entries, k %lld, %s query %s, %s, query %s, "
      "heads %s, %s",
      c.name.c_str(),
      static_cast<long long>(s.num_rows),
      s.num_query_heads,
      s.num_kv_heads,
      s.dim,
      static_cast<long long>(s.num_entries),
      static_cast<long long>(s.max_k),
      std::string(to_string(s.dtype)).c_str(),
      std::string(to_string(s.query_dtype)).c_str(),
      s.score == ScoreForm::kBound ? "bound" : "dot",
      kQuery[static_cast<int>(c.reductions.query)],
      kHead[static_cast<int>(c.reductions.head)],
      kNumbers[static_cast<int>(c.numbers)]);
  return text;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  add_reductions(cases);
  add_sizes(cases);
  add_prefill(cases);
  add_real(cases);
  return cases;
}

}  // namespace longspan::cuda
