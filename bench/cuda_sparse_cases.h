// Cases of the sparse decode step (kernels/cuda/sparse_decode.h) and their check against double
// precision.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/sparse_policy.h"

namespace longspan::cuda {

enum class SparseNumbers : uint8_t {
  kNormal,
  kWhole,    // small integers: scores are exact, and many tie
  kEqual,    // one summary everywhere: all scores tie
  kHotPage,  // the best candidates lie side by side
  kSpecial,  // whole, with NaN and infinities among the summaries
};

struct SparseCase {
  std::string name;
  SparseShape shape;
  SparseNumbers numbers = SparseNumbers::kNormal;
  DataType out_dtype = DataType::kFloat32;
  float soft_cap = 0.0F;
  int64_t num_tokens = 0;   // that the last row sees; those before see 37 less each
  int64_t arena_pages = 0;  // pages of keys and values; fewer than the context's lie there again
  bool overlap = false;     // candidates are all whole blocks, forced or not
  int num_sms = 132;        // that the plan is made for
  int max_cluster_size = 16;
};

SparseCase make_sparse_case(
    const std::string& name, int query_heads, int kv_heads, int dim, int64_t num_tokens, int64_t k);
std::string describe(const SparseCase& c);
std::vector<SparseCase> all_sparse_cases();

// Runs the step twice on fresh random inputs and prints a line, and what is wrong first.
bool run_sparse_case(const SparseCase& c, const DeviceInfo& device, std::mt19937_64& random);

}  // namespace longspan::cuda
