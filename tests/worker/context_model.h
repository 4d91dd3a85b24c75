// A context as a test knows it: plain arrays beside a context of a group, and answers of the group
// held against the reference pipeline over those arrays.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/reference/pipeline.h"
#include "tests/support/cases.h"
#include "worker/group.h"

namespace longspan::testing {

struct Rows {
  std::vector<float> keys;    // [rows][G][D], as sent
  std::vector<float> values;  // [rows][G][E]
};

// What one call asks.
struct Question {
  int layer = 0;
  Phase phase = Phase::kDecode;
  int64_t start_pos = 0;
  int64_t num_rows = 1;
  bool brings_tokens = false;
};

// Counts over all comparisons of a test: rows whose selection hangs on a tie closer than single
// precision resolves are left out, and must stay few.
struct Tally {
  int64_t rows = 0;  // times heads
  int64_t left_out = 0;
};

class ContextModel {
 public:
  ContextModel(Group& group, ContextHandle handle, ContextShape shape, Random& random)
      : group_(group),
        handle_(handle),
        shape_(std::move(shape)),
        random_(random),
        layers_(static_cast<size_t>(shape_.num_layers)) {}

  ContextHandle handle() const { return handle_; }
  int64_t length(int layer) const;
  const ContextShape& shape() const { return shape_; }

  Rows make_rows(int64_t num_rows);
  // Rows that the model holds already, as they would be sent again.
  Rows stored_rows(int layer, int64_t begin, int64_t end) const;

  // Writes to every layer in several calls, then commits.
  void append(int64_t num_tokens);
  void add(int layer, const Rows& rows);
  Status write(int layer, int64_t start_pos, const Rows& rows);
  void truncate(int64_t num_tokens);
  ContextModel fork(ContextHandle child, int64_t num_tokens);

  // Asks with fresh queries and compares outputs, lse, selection and counts.
  void ask(const Question& question, const Method& method, Tally& tally);
  // The same for several questions in one step, each of its own model.
  struct Part {
    ContextModel* model;
    Question question;
    const Method* method;
  };
  static void ask_together(Group& group, const std::vector<Part>& parts, Tally& tally);

 private:
  struct Layer {
    std::vector<float> keys;  // rounded to the cache's type
    std::vector<float> values;
  };
  struct Numbers;  // of one question

  Numbers make_numbers(const Question& question, const Method& method);
  AttendItem item(const Question& question, const Method& method, const Numbers& numbers) const;
  ReferenceResult reference_of(const Question& question,
                               const Method& method,
                               const Numbers& numbers) const;
  void check(const Question& question,
             const Method& method,
             const Numbers& numbers,
             const AttendResult& result,
             Tally& tally) const;
  size_t key_row() const {
    return static_cast<size_t>(shape_.num_kv_heads) * static_cast<size_t>(shape_.key_dim);
  }
  size_t value_row() const {
    return static_cast<size_t>(shape_.num_kv_heads) * static_cast<size_t>(shape_.value_dim);
  }

  Group& group_;
  ContextHandle handle_;
  ContextShape shape_;
  Random& random_;
  std::vector<Layer> layers_;
};

inline TensorIn fp32(const std::vector<float>& values) {
  return {DataType::kFloat32, values.empty() ? nullptr : values.data()};
}

}  // namespace longspan::testing
