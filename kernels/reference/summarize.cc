// Summaries accumulate in single precision and in token order, so that every backend keeps the same
// bits; this is the one stage that is not in double precision.
#include <cmath>

#include "kernels/reference/stages.h"

namespace longspan::reference {
namespace {

// Channel `channel` of the keys or the values of one token.
struct Channel {
  const PagedView* view;
  bool values;
  int kv_head;
  int channel;

  float operator()(int64_t token) const {
    const std::byte* row = values ? view->value(token, kv_head) : view->key(token, kv_head);
    return load_element(view->dtype, row, static_cast<size_t>(channel));
  }
};

float mean(const Channel& channel, int64_t begin, int64_t length) {
  float sum = 0.0F;
  for (int64_t i = 0; i < length; ++i) {
    sum += channel(begin + i);
  }
  return sum * (1.0F / static_cast<float>(length));  // exact but for underflow: a power of two
}

float weighted_sum(const Channel& channel, int64_t begin, const std::vector<float>& weights) {
  float sum = 0.0F;
  for (size_t i = 0; i < weights.size(); ++i) {
    sum = std::fma(weights[i], channel(begin + static_cast<int64_t>(i)), sum);
  }
  return sum;
}

float pooled(const Channel& channel,
             int64_t begin,
             int64_t length,
             const std::vector<float>& weights) {
  return weights.empty() ? mean(channel, begin, length) : weighted_sum(channel, begin, weights);
}

// The first token's element stays where no later one is strictly beyond it, so a NaN stays only
// when it comes first.
float extreme(const Channel& channel, int64_t begin, int64_t length, bool maximum) {
  float best = channel(begin);
  for (int64_t i = 1; i < length; ++i) {
    const float element = channel(begin + i);
    const bool beyond = maximum ? element > best : element < best;
    best = beyond ? element : best;
  }
  return best;
}

float key_summary(const SummarySpec& spec, const Channel& keys, int64_t begin) {
  switch (spec.kind) {
    case SummaryKind::kMean: {
      const float average = mean(keys, begin, spec.block_tokens);
      return spec.scale_by_sqrt_length
                 ? average * static_cast<float>(std::sqrt(static_cast<double>(spec.block_tokens)))
                 : average;
    }
    case SummaryKind::kMinMax:
      return extreme(keys, begin, spec.block_tokens, /*maximum=*/false);
    case SummaryKind::kCompressed:
      return pooled(keys, begin, spec.window_tokens, spec.key_weights);
    case SummaryKind::kNone:
      break;
  }
  return 0.0F;
}

float value_summary(const SummarySpec& spec,
                    const SummarizeParams& params,
                    int kv_head,
                    int channel,
                    int64_t begin) {
  if (spec.kind == SummaryKind::kMinMax) {
    const Channel keys{&params.tokens, /*values=*/false, kv_head, channel};
    return extreme(keys, begin, spec.block_tokens, /*maximum=*/true);
  }
  const Channel values{&params.tokens, /*values=*/true, kv_head, channel};
  const std::vector<float>& weights =
      spec.value_weights.empty() ? spec.key_weights : spec.value_weights;
  return pooled(values, begin, spec.window_tokens, weights);
}

}  // namespace

void summarize(const SummarizeParams& params) {
  const SummarySpec& spec = *params.spec;
  const PagedView& out = params.out;
  for (int64_t i = 0; i < params.num_entries; ++i) {
    const int64_t begin = (params.first_entry + i) * spec.stride();
    const int64_t entry = params.first_out + i;
    for (int kv_head = 0; kv_head < out.num_kv_heads; ++kv_head) {
      auto* keys = const_cast<std::byte*>(out.key(entry, kv_head));
      for (int channel = 0; channel < out.key_dim; ++channel) {
        const Channel tokens{&params.tokens, /*values=*/false, kv_head, channel};
        store_element(
            out.dtype, keys, static_cast<size_t>(channel), key_summary(spec, tokens, begin));
      }
      auto* values = const_cast<std::byte*>(out.value(entry, kv_head));
      for (int channel = 0; channel < out.value_dim; ++channel) {
        store_element(out.dtype,
                      values,
                      static_cast<size_t>(channel),
                      value_summary(spec, params, kv_head, channel, begin));
      }
    }
  }
}

}  // namespace longspan::reference
