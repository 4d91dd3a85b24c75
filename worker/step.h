// A step: what the lead tells every rank to do next, as data. All ranks run the same steps in the
// same order; what is not in the step each rank computes alike from the context's shape.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "worker/group.h"

namespace longspan {

enum class StepKind : uint8_t {
  kCreate,
  kRemove,
  kFork,
  kTruncate,
  kCommit,
  kRollback,
  kWrite,  // every task stores rows
  kAttend,
  kStop,
};

// Rows of one layer of one context: to be stored, to be answered, or both.
struct Task {
  ContextHandle context = 0;
  int layer = 0;
  int64_t start_pos = 0;
  int64_t num_rows = 0;
  // Keys and values come along. Rows below the staged end at the step's start are compared with
  // what is stored, the others appended.
  bool has_tokens = false;
  bool show = false;  // what is written becomes visible at once

  // kAttend alone.
  Phase phase = Phase::kDecode;
  int method_index = 0;  // in the context's methods; -1: `method`
  Method method;
  bool return_selection = false;
  bool compare_with_dense = false;
};

struct Step {
  StepKind kind = StepKind::kStop;
  ContextHandle context = 0;
  ContextHandle child = 0;       // kFork
  int64_t num_tokens = 0;        // kFork, kTruncate
  ContextShape shape = {};       // kCreate
  std::vector<Task> tasks = {};  // kWrite, kAttend
};

void serialize(const Step& step, std::vector<std::byte>& out);
// DATA_LOSS when the bytes are not a step.
StatusOr<Step> parse_step(std::span<const std::byte> bytes);

}  // namespace longspan
