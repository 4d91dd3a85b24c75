// Summaries of finished blocks and windows, entries shared out to threads.
#include <algorithm>
#include <cmath>

#include "base/checked.h"
#include "kernels/simd/stages.h"

namespace longspan::simd {
namespace {

// Tokens that a task of its own is worth.
constexpr int64_t kTokensPerTask = 1024;

// Pools the keys or the values of tokens [begin, begin + num_tokens) of one KV head into state.
void pool_tokens(const Target& target,
                 const PagedView& tokens,
                 bool values,
                 int kv_head,
                 int64_t begin,
                 int64_t num_tokens,
                 PoolRows pool) {
  const float* weights = pool.weights;
  pool.dtype = tokens.dtype;
  pool.dim = static_cast<size_t>(values ? tokens.value_dim : tokens.key_dim);
  for (int64_t done = 0; done < num_tokens;) {
    const int64_t token = begin + done;
    const int64_t count = std::min(kPageTokens - token % kPageTokens, num_tokens - done);
    pool.rows = values ? tokens.value(token, kv_head) : tokens.key(token, kv_head);
    pool.num_rows = static_cast<size_t>(count);
    pool.weights = weights == nullptr ? nullptr : weights + done;
    target.pool_rows(pool);
    done += count;
  }
}

void store_row(const PagedView& out, const std::byte* row, const float* values, int dim) {
  auto* writable = const_cast<std::byte*>(row);
  for (int channel = 0; channel < dim; ++channel) {
    store_element(out.dtype, writable, static_cast<size_t>(channel), values[channel]);
  }
}

// One entry and KV head; `state` has room for two rows.
class Entry {
 public:
  Entry(
      const SummarizeParams& params, const Target& target, int64_t index, int kv_head, float* state)
      : params_(params),
        target_(target),
        spec_(*params.spec),
        begin_((params.first_entry + index) * spec_.stride()),
        out_(params.first_out + index),
        kv_head_(kv_head),
        state_(state) {}

  void write() const {
    if (spec_.kind == SummaryKind::kMinMax) {
      write_extremes();
      return;
    }
    const float length_factor =
        spec_.scale_by_sqrt_length
            ? static_cast<float>(std::sqrt(static_cast<double>(spec_.block_tokens)))
            : 1.0F;
    const bool weighted = spec_.kind == SummaryKind::kCompressed && !spec_.key_weights.empty();
    const float* key_weights = weighted ? spec_.key_weights.data() : nullptr;
    pool(/*values=*/false, key_weights, length_factor);
    store_row(params_.out, params_.out.key(out_, kv_head_), state_, params_.out.key_dim);
    if (spec_.kind == SummaryKind::kCompressed) {
      pool(/*values=*/true,
           spec_.value_weights.empty() ? key_weights : spec_.value_weights.data(),
           1.0F);
      store_row(params_.out, params_.out.value(out_, kv_head_), state_, params_.out.value_dim);
    }
  }

 private:
  void write_extremes() const {
    const int dim = params_.out.key_dim;
    float* maxima = state_ + dim;
    const std::byte* first = params_.tokens.key(begin_, kv_head_);
    for (int channel = 0; channel < dim; ++channel) {
      state_[channel] = load_element(params_.tokens.dtype, first, static_cast<size_t>(channel));
      maxima[channel] = state_[channel];
    }
    PoolRows pool;
    pool.pooling = Pooling::kExtremes;
    pool.state = state_;
    pool.maxima = maxima;
    pool_tokens(target_, params_.tokens, false, kv_head_, begin_ + 1, spec_.block_tokens - 1, pool);
    store_row(params_.out, params_.out.key(out_, kv_head_), state_, dim);
    store_row(params_.out, params_.out.value(out_, kv_head_), maxima, dim);
  }

  void pool(bool values, const float* weights, float length_factor) const {
    const int dim = values ? params_.out.value_dim : params_.out.key_dim;
    std::fill_n(state_, dim, 0.0F);
    PoolRows pool;
    pool.pooling = weights == nullptr ? Pooling::kSum : Pooling::kWeightedSum;
    pool.weights = weights;
    pool.state = state_;
    pool_tokens(target_, params_.tokens, values, kv_head_, begin_, spec_.span(), pool);
    const float mean_factor = weights == nullptr ? 1.0F / static_cast<float>(spec_.span()) : 1.0F;
    for (int channel = 0; channel < dim; ++channel) {
      state_[channel] = state_[channel] * mean_factor * length_factor;
    }
  }

  const SummarizeParams& params_;
  const Target& target_;
  const SummarySpec& spec_;
  int64_t begin_;  // first token
  int64_t out_;
  int kv_head_;
  float* state_;
};

}  // namespace

Status summarize(const SummarizeParams& params, Machine& machine) {
  const auto state_floats =
      2 * static_cast<size_t>(std::max(params.out.key_dim, params.out.value_dim));
  for (Arena& arena : machine.arenas) {
    LONGSPAN_RETURN_IF_ERROR(arena.reserve(state_floats * sizeof(float), /*num_takes=*/1));
  }
  const int64_t entries_per_task = std::max<int64_t>(
      1, kTokensPerTask / (int64_t{params.spec->span()} * params.out.num_kv_heads));
  machine.pool.run(divide_up(params.num_entries, entries_per_task), [&](int64_t index, int thread) {
    Arena& arena = machine.arenas[static_cast<size_t>(thread)];
    arena.reset();
    auto* state = arena.take<float>(state_floats);
    const int64_t begin = index * entries_per_task;
    const int64_t end = std::min(begin + entries_per_task, params.num_entries);
    for (int64_t entry = begin; entry < end; ++entry) {
      for (int kv_head = 0; kv_head < params.out.num_kv_heads; ++kv_head) {
        Entry(params, machine.target, entry, kv_head, state).write();
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace longspan::simd
