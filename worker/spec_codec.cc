#include "worker/spec_codec.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"

#include "base/checked.h"
#include "worker/method_codec.h"
#include "worker/tensor_codec.h"

namespace longspan {
namespace {

constexpr int kMaxHeadDim = 1024;
constexpr int kMaxMethods = 64;
constexpr int kMaxLabels = 64;
constexpr size_t kMaxLabelLength = 256;
constexpr size_t kMaxFingerprintLength = 256;

int decode_count(uint32_t value, uint32_t max, const char* field, Findings& findings) {
  if (value < 1 || value > max) {
    findings.add_invalid(field, absl::StrCat("must be from 1 to ", max, ", is ", value));
    return 0;
  }
  return static_cast<int>(value);
}

float decode_factor(double value, const char* field, Findings& findings) {
  const auto factor = static_cast<float>(value);
  if (!std::isfinite(factor) || value < 0) {
    findings.add_invalid(field, "must be finite and not negative");
    return 0.0F;
  }
  return factor;
}

void decode_heads(const v1::ContextSpec& message,
                  const v1::Limits& limits,
                  ContextShape& shape,
                  Findings& findings) {
  shape.num_layers =
      decode_count(message.num_layers(), limits.max_layers(), "num_layers", findings);
  shape.num_query_heads = decode_count(
      message.num_query_heads(), limits.max_query_heads(), "num_query_heads", findings);
  shape.num_kv_heads =
      decode_count(message.num_kv_heads(), limits.max_query_heads(), "num_kv_heads", findings);
  if (shape.num_kv_heads > 0 && shape.num_query_heads % shape.num_kv_heads != 0) {
    findings.add_invalid("num_kv_heads", "must divide num_query_heads");
  }
  shape.key_dim = decode_count(message.key_head_dim(), kMaxHeadDim, "key_head_dim", findings);
  shape.value_dim =
      message.value_head_dim() == 0
          ? shape.key_dim
          : decode_count(message.value_head_dim(), kMaxHeadDim, "value_head_dim", findings);
  if (message.kv_dtype() == v1::DATA_TYPE_FP8_E4M3 ||
      message.kv_dtype() == v1::DATA_TYPE_FP8_E5M2) {
    findings.add_unserved("kv_dtype", "FP8 is not served");
  } else if (message.kv_dtype() != v1::DATA_TYPE_UNSPECIFIED &&
             !decode_data_type(message.kv_dtype(), shape.kv_dtype)) {
    findings.add_invalid("kv_dtype", "must be FP32, FP16 or BF16");
  }
  shape.scale = decode_factor(message.scale(), "scale", findings);
  if (shape.scale == 0.0F && shape.key_dim > 0) {
    shape.scale = 1.0F / std::sqrt(static_cast<float>(shape.key_dim));
  }
  shape.soft_cap = decode_factor(message.logit_soft_cap(), "logit_soft_cap", findings);

  const int64_t heads = shape.num_query_heads;
  const int64_t sinks = message.sink_logits_size();
  if (sinks != 0 && sinks != heads && sinks != heads * shape.num_layers) {
    findings.add_invalid(
        "sink_logits",
        absl::StrCat("must have 0, ", heads, " or ", heads * shape.num_layers, " values"));
  } else if (!std::all_of(message.sink_logits().begin(),
                          message.sink_logits().end(),
                          [](float logit) { return std::isfinite(logit); })) {
    findings.add_invalid("sink_logits", "must be finite");
  }
  shape.sink_logits.assign(message.sink_logits().begin(), message.sink_logits().end());
}

size_t decode_methods(const v1::ContextSpec& message,
                      const ServerTerms& terms,
                      ContextShape& shape,
                      Findings& findings) {
  if (message.methods_size() > kMaxMethods) {
    findings.add_invalid("methods", absl::StrCat("must be at most ", kMaxMethods));
    return 0;
  }
  if (message.methods_size() == 0) {
    shape.methods.push_back(dense_method());
  }
  std::set<std::string> names;
  const bool whole = findings.empty();
  for (int i = 0; i < message.methods_size(); ++i) {
    const std::string path = absl::StrCat("methods[", i, "]");
    shape.methods.push_back(decode_method(message.methods(i), path, findings));
    if (!names.insert(message.methods(i).name()).second) {
      findings.add_invalid(path + ".name", "is taken by another method of the context");
    }
  }
  if (whole && findings.empty()) {
    for (size_t i = 0; i < shape.methods.size(); ++i) {
      const Status status = check_support(*terms.backend, shape, shape.methods[i]);
      if (!status.ok()) {
        findings.add_unserved(absl::StrCat("methods[", i, "]"), status.message());
      }
    }
  }
  for (size_t i = 0; i < shape.methods.size(); ++i) {
    if (message.default_method().empty() || shape.methods[i].name == message.default_method()) {
      return i;
    }
  }
  findings.add_invalid("default_method", "is none of the context's methods");
  return 0;
}

void decode_layout(const v1::ContextSpec& message,
                   const ServerTerms& terms,
                   ContextShape& shape,
                   Findings& findings) {
  const uint64_t limit = terms.limits.max_context_tokens();
  if (message.max_tokens() > limit) {
    findings.add_invalid("max_tokens", absl::StrCat("must be at most ", limit));
  }
  shape.max_tokens = static_cast<int64_t>(
      message.max_tokens() == 0 ? limit : std::min<uint64_t>(message.max_tokens(), limit));

  LayoutKind kind = LayoutKind::kBlockCyclic;
  switch (message.layout().kind()) {
    case v1::Layout::KIND_UNSPECIFIED:
    case v1::Layout::KIND_BLOCK_CYCLIC:
      break;
    case v1::Layout::KIND_CONTIGUOUS:
      kind = LayoutKind::kContiguous;
      break;
    case v1::Layout::KIND_ZIGZAG:
      kind = LayoutKind::kZigzag;
      break;
    default:
      findings.add_invalid("layout.kind", "has an unknown value");
  }
  if (!findings.empty()) {
    return;  // the alignment of broken methods means nothing
  }
  int64_t alignment = kPageTokens;
  for (const Method& method : shape.methods) {
    alignment = std::lcm(alignment, method.alignment_tokens());
  }
  const StatusOr<Layout> layout = Layout::make(
      kind, terms.num_ranks, message.layout().stripe_tokens(), shape.max_tokens, alignment);
  if (!layout.ok()) {
    for (const FieldError& error : field_errors(layout.status())) {
      findings.add_invalid(error.field, error.description);
    }
    return;
  }
  shape.layout = *layout;
}

void check_bookkeeping(const v1::ContextSpec& message, Findings& findings) {
  if (message.model_fingerprint().size() > kMaxFingerprintLength) {
    findings.add_invalid("model_fingerprint",
                         absl::StrCat("must have at most ", kMaxFingerprintLength, " bytes"));
  }
  if (message.labels_size() > kMaxLabels) {
    findings.add_invalid("labels", absl::StrCat("must be at most ", kMaxLabels));
  }
  for (const auto& [key, value] : message.labels()) {
    if (key.empty() || key.size() > kMaxLabelLength || value.size() > kMaxLabelLength) {
      findings.add_invalid(
          "labels",
          absl::StrCat("keys must have 1 to ", kMaxLabelLength, " bytes, values at most as many"));
      break;
    }
  }
  if (message.has_ttl() &&
      (message.ttl().seconds() < 0 || message.ttl().nanos() < 0 ||
       message.ttl().nanos() >= 1'000'000'000 || message.ttl().seconds() > 315'360'000 ||
       (message.ttl().seconds() == 0 && message.ttl().nanos() == 0))) {
    findings.add_invalid("ttl", "must be positive and at most ten years");
  }
  switch (message.durability()) {
    case v1::ContextSpec::DURABILITY_UNSPECIFIED:
    case v1::ContextSpec::DURABILITY_CACHE:
      break;
    case v1::ContextSpec::DURABILITY_REPLICATED:
    case v1::ContextSpec::DURABILITY_SNAPSHOT:
      findings.add_unserved("durability", "only CACHE is served");
      break;
    default:
      findings.add_invalid("durability", "has an unknown value");
  }
}

}  // namespace

DecodedSpec decode_spec(const v1::ContextSpec& message,
                        const ServerTerms& terms,
                        Findings& findings) {
  DecodedSpec spec;
  decode_heads(message, terms.limits, spec.shape, findings);
  check_bookkeeping(message, findings);
  spec.default_method = decode_methods(message, terms, spec.shape, findings);
  decode_layout(message, terms, spec.shape, findings);
  return spec;
}

v1::ContextSpec effective_spec(const v1::ContextSpec& message, const DecodedSpec& decoded) {
  const ContextShape& shape = decoded.shape;
  v1::ContextSpec spec = message;
  spec.set_value_head_dim(static_cast<uint32_t>(shape.value_dim));
  spec.set_kv_dtype(encode_data_type(shape.kv_dtype));
  spec.set_scale(shape.scale);
  if (spec.methods().empty()) {
    *spec.add_methods() = encode_dense_method();
  }
  spec.set_default_method(shape.methods[decoded.default_method].name);
  v1::Layout& layout = *spec.mutable_layout();
  layout.set_stripe_tokens(static_cast<uint32_t>(
      std::min<int64_t>(shape.layout.stripe_tokens, std::numeric_limits<uint32_t>::max())));
  if (layout.kind() == v1::Layout::KIND_UNSPECIFIED) {
    layout.set_kind(v1::Layout::KIND_BLOCK_CYCLIC);
  }
  spec.set_max_tokens(static_cast<uint64_t>(shape.max_tokens));
  spec.set_durability(v1::ContextSpec::DURABILITY_CACHE);
  return spec;
}

Status check_support(const Backend& backend, const ContextShape& shape, const Method& method) {
  return backend.supports({.method = &method,
                           .num_query_heads = shape.num_query_heads,
                           .num_kv_heads = shape.num_kv_heads,
                           .key_dim = shape.key_dim,
                           .value_dim = shape.value_dim,
                           .kv_dtype = shape.kv_dtype});
}

int64_t kv_bytes_per_token(const ContextShape& shape) {
  return static_cast<int64_t>(shape.num_layers) * shape.num_kv_heads *
         (shape.key_dim + shape.value_dim) * static_cast<int64_t>(size_of(shape.kv_dtype));
}

double summary_bytes_per_token(const ContextShape& shape) {
  std::vector<SummarySpec> kept;
  double dims_per_token = 0;  // channels of summaries a token and KV head
  for (const Method& method : shape.methods) {
    for (const SummarySpec& summary : method.summaries()) {
      if (std::find(kept.begin(), kept.end(), summary) != kept.end()) {
        continue;
      }
      kept.push_back(summary);
      const int dims = summary.kind == SummaryKind::kMean     ? shape.key_dim
                       : summary.kind == SummaryKind::kMinMax ? 2 * shape.key_dim
                                                              : shape.key_dim + shape.value_dim;
      dims_per_token += static_cast<double>(dims) / summary.stride();
    }
  }
  return dims_per_token * shape.num_layers * shape.num_kv_heads *
         static_cast<double>(size_of(shape.kv_dtype));
}

}  // namespace longspan
