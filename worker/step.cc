#include "worker/step.h"

#include <concepts>
#include <cstring>
#include <string>
#include <type_traits>

namespace longspan {
namespace {

// One description of every structure serves writing and reading: an archive is called with each
// field in turn.
class Writer {
 public:
  explicit Writer(std::vector<std::byte>& out) : out_(out) {}

  void bytes(const void* data, size_t size) {
    const auto* first = static_cast<const std::byte*>(data);
    out_.insert(out_.end(), first, first + size);
  }
  template <typename Element>
  size_t length(const Element& container) {
    const uint64_t size = container.size();
    bytes(&size, sizeof size);
    return size;
  }

 private:
  std::vector<std::byte>& out_;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> in) : in_(in) {}

  void bytes(void* data, size_t size) {
    if (size == 0) {
      return;
    }
    if (size > in_.size()) {
      failed_ = true;
      in_ = {};
      std::memset(data, 0, size);
      return;
    }
    std::memcpy(data, in_.data(), size);
    in_ = in_.subspan(size);
  }
  // Every element takes at least one byte, so that a length beyond the rest is no length.
  template <typename Container>
  size_t length(Container& container) {
    uint64_t size = 0;
    bytes(&size, sizeof size);
    if (size > in_.size()) {
      failed_ = true;
      size = 0;
    }
    container.resize(size);
    return size;
  }
  bool complete() const { return !failed_ && in_.empty(); }

 private:
  std::span<const std::byte> in_;
  bool failed_ = false;
};

template <typename Archive, typename Value>
requires std::is_arithmetic_v<Value> || std::is_enum_v<Value>
void describe(Archive& archive, Value& value) { archive.bytes(&value, sizeof value); }

template <typename Archive>
void describe(Archive& archive, std::string& text) {
  archive.length(text);
  archive.bytes(text.data(), text.size());
}

template <typename Archive, typename Value>
void describe(Archive& archive, std::vector<Value>& values) {
  archive.length(values);
  for (Value& value : values) {
    describe(archive, value);
  }
}

template <typename Archive, typename... Fields>
void describe_all(Archive& archive, Fields&... fields) {
  (describe(archive, fields), ...);
}

template <typename Archive>
void describe(Archive& archive, Rational& rational) {
  describe_all(archive, rational.numerator, rational.denominator);
}

template <typename Archive>
void describe(Archive& archive, SummarySpec& spec) {
  describe_all(archive,
               spec.kind,
               spec.block_tokens,
               spec.window_tokens,
               spec.stride_tokens,
               spec.key_weights,
               spec.value_weights,
               spec.scale_by_sqrt_length);
}

template <typename Archive>
void describe(Archive& archive, SearchSpec& spec) {
  describe_all(archive,
               spec.query,
               spec.query_reduce,
               spec.view,
               spec.score,
               spec.normalise,
               spec.head_reduce,
               spec.anchor_power,
               spec.anchor_first_stripe);
}

template <typename Archive>
void describe(Archive& archive, SelectionSpec& spec) {
  describe_all(archive,
               spec.kind,
               spec.block_tokens,
               spec.forced_first_blocks,
               spec.forced_last_blocks,
               spec.forced_within_budget,
               spec.spans,
               spec.span_power,
               spec.span_backward,
               spec.span_forward);
}

template <typename Archive>
void describe(Archive& archive, Amount& amount) {
  describe_all(archive, amount.kind, amount.value, amount.min_blocks, amount.max_blocks);
}

template <typename Archive>
void describe(Archive& archive, Branch& branch) {
  describe_all(archive,
               branch.name,
               branch.source,
               branch.summary,
               branch.search,
               branch.selection,
               branch.mask.window_tokens,
               branch.mask.sink_tokens,
               branch.budget.prefill,
               branch.budget.decode);
}

template <typename Archive>
void describe(Archive& archive, Method& method) {
  describe_all(archive,
               method.name,
               method.branches,
               method.merge,
               method.dense_layers,
               method.dense_prefill,
               method.dense_decode,
               method.dense_below_tokens);
}

template <typename Archive>
void describe(Archive& archive, ContextShape& shape) {
  describe_all(archive,
               shape.num_layers,
               shape.num_query_heads,
               shape.num_kv_heads,
               shape.key_dim,
               shape.value_dim,
               shape.kv_dtype,
               shape.scale,
               shape.soft_cap,
               shape.sink_logits,
               shape.methods,
               shape.layout.kind,
               shape.layout.num_ranks,
               shape.layout.stripe_tokens,
               shape.max_tokens);
}

template <typename Archive>
void describe(Archive& archive, Task& task) {
  describe_all(archive,
               task.context,
               task.layer,
               task.start_pos,
               task.num_rows,
               task.has_tokens,
               task.show,
               task.phase,
               task.method_index,
               task.return_selection,
               task.compare_with_dense);
  if (task.method_index < 0) {
    describe(archive, task.method);
  }
}

template <typename Archive>
void describe(Archive& archive, Step& step) {
  describe_all(archive, step.kind, step.context, step.child, step.num_tokens);
  if (step.kind == StepKind::kCreate) {
    describe(archive, step.shape);
  }
  describe(archive, step.tasks);
}

}  // namespace

void serialize(const Step& step, std::vector<std::byte>& out) {
  Writer writer(out);
  // Writing reads the fields only; the description is shared with reading, which does not.
  describe(writer, const_cast<Step&>(step));
}

StatusOr<Step> parse_step(std::span<const std::byte> bytes) {
  Step step;
  Reader reader(bytes);
  describe(reader, step);
  if (!reader.complete()) {
    return absl::DataLossError("a step descriptor is damaged");
  }
  return step;
}

}  // namespace longspan
