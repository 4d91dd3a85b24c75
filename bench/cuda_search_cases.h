// Cases of the fused search (kernels/cuda/search_topk.h) and their check against scores in double
// precision.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/search_policy.h"

namespace longspan::cuda {

// The reductions as methods name them (kernels/method.h), and the shape that they become.
enum class QueryReduce : uint8_t { kNone, kGroupMean, kAllMean };
enum class HeadReduce : uint8_t {
  kNone,
  kGroupSum,
  kGroupMean,
  kGroupMax,
  kAllSum,
  kAllMean,
  kAllMax
};

struct Reductions {
  QueryReduce query = QueryReduce::kNone;
  HeadReduce head = HeadReduce::kNone;
};

// kFew: mostly 0, so that most scores are equal.
enum class Numbers : uint8_t { kNormal, kWhole, kSpecial, kFew };

struct Case {
  std::string name;
  SearchShape shape;
  Reductions reductions;
  Numbers numbers = Numbers::kNormal;
  bool causal = false;  // rows see one entry more every 64 / rows; otherwise random ranges
  int num_sms = 0;      // that the plan is made for; 0: the device's
};

// Fills in what follows from the reductions.
void set_reductions(const Reductions& reductions, SearchShape& shape);
std::string describe(const Case& c);
Case make_case(const std::string& name, int query_heads, int kv_heads, int dim, int64_t entries);
std::vector<Case> all_cases();

// Runs the search twice on fresh random inputs and prints a line, and what is wrong first.
bool run_case(Case c, const DeviceInfo& device, std::mt19937_64& random);

}  // namespace longspan::cuda
