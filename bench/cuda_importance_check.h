// Cases of NSA's importance (kernels/cuda/importance.h) and their check against double precision.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/importance_policy.h"

namespace longspan::cuda {

struct ImportanceCase {
  std::string name;
  ImportanceShape shape;
  bool rounded_queries = false;  // fp32 queries that are numbers of the summaries' type
  bool special = false;          // some NaN and infinities among the windows
  int num_sms = 0;               // that the plan is made for; 0: the device's
};

std::string describe(const ImportanceCase& c);
std::vector<ImportanceCase> importance_cases();

// Runs a case twice on fresh random inputs and prints a line, and what is wrong first.
bool run_importance_case(const ImportanceCase& c,
                         const DeviceInfo& device,
                         std::mt19937_64& random);

}  // namespace longspan::cuda
