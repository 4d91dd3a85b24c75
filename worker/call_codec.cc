#include "worker/call_codec.h"

#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/checked.h"
#include "worker/method_codec.h"
#include "worker/tensor_codec.h"

namespace longspan {
namespace {

constexpr uint64_t kMaxPosition = uint64_t{1} << 48;

// The fields that Decode, Prefill and Explain share. Null: absent.
struct CallFields {
  uint32_t layer = 0;
  const uint64_t* start_pos = nullptr;
  const v1::Tensor* query = nullptr;
  const v1::Tensor* key = nullptr;
  const v1::Tensor* value = nullptr;
  const v1::Tensor* gates = nullptr;
  const v1::Tensor* search_query = nullptr;
  const std::string* method_name = nullptr;
  const v1::Method* method = nullptr;
  const char* method_field = "";
  int64_t max_rows = 0;
};

template <class Message>
const v1::Tensor* tensor_if(bool present, const Message& tensor) {
  return present ? &tensor : nullptr;
}

// Finds or decodes the method of a call.
Status decode_call_method(const CallFields& fields,
                          const OpenContext& context,
                          const ServerTerms& terms,
                          DecodedItem& decoded,
                          Findings& findings) {
  if (fields.method == nullptr) {
    decoded.item.method = context.find_method(*fields.method_name);
    if (decoded.item.method == nullptr) {
      return with_reason(absl::NotFoundError(absl::StrCat(
                             "the context has no method \"", *fields.method_name, "\"")),
                         "METHOD_NOT_FOUND",
                         {{"method", *fields.method_name}});
    }
    return absl::OkStatus();
  }
  if (!fields.method_name->empty()) {
    findings.add_invalid(fields.method_field, "must not be given together with a method's name");
  }
  decoded.inline_method =
      std::make_unique<Method>(decode_method(*fields.method, fields.method_field, findings));
  decoded.item.method = decoded.inline_method.get();
  if (findings.empty()) {
    const Status status = check_support(*terms.backend, context.shape(), *decoded.inline_method);
    if (!status.ok()) {
      findings.add_unserved(fields.method_field, status.message());
    }
  }
  return absl::OkStatus();
}

void decode_layer(uint32_t layer, const ContextShape& shape, int& decoded, Findings& findings) {
  if (layer >= static_cast<uint32_t>(shape.num_layers)) {
    findings.add_invalid("layer", absl::StrCat("must be below ", shape.num_layers, ", is ", layer));
    return;
  }
  decoded = static_cast<int>(layer);
}

void decode_position(uint64_t position, int64_t& decoded, Findings& findings) {
  if (position > kMaxPosition) {
    findings.add_invalid("start_pos", absl::StrCat("must be at most ", kMaxPosition));
    return;
  }
  decoded = static_cast<int64_t>(position);
}

void decode_keys(const CallFields& fields,
                 const ContextShape& shape,
                 AttendItem& item,
                 Findings& findings) {
  if ((fields.key == nullptr) != (fields.value == nullptr)) {
    findings.add_invalid(fields.key == nullptr ? "key" : "value",
                         "is missing: keys and values come together");
    return;
  }
  if (fields.key == nullptr) {
    return;
  }
  if (fields.start_pos == nullptr) {
    findings.add_invalid("start_pos", "is needed with keys and values");
  }
  item.key = decode_tensor(*fields.key,
                           {.num_rows = item.num_rows,
                            .num_heads = shape.num_kv_heads,
                            .dim = shape.key_dim,
                            .stored_as = shape.kv_dtype},
                           "key",
                           findings)
                 .tensor;
  item.value = decode_tensor(*fields.value,
                             {.num_rows = item.num_rows,
                              .num_heads = shape.num_kv_heads,
                              .dim = shape.value_dim,
                              .stored_as = shape.kv_dtype},
                             "value",
                             findings)
                   .tensor;
}

// What a method asks for beside queries, keys and values.
void decode_extras(const CallFields& fields,
                   const ContextShape& shape,
                   AttendItem& item,
                   Findings& findings) {
  const Method& method = *item.method;
  if (fields.gates != nullptr) {
    if (!method.needs_gates()) {
      findings.add_invalid("gates", absl::StrCat("the method ", method.name, " takes none"));
    } else {
      item.gates = decode_tensor(*fields.gates,
                                 {.num_rows = item.num_rows,
                                  .num_heads = shape.num_query_heads,
                                  .dim = static_cast<int64_t>(method.branches.size()),
                                  .fp32_only = true},
                                 "gates",
                                 findings)
                       .tensor;
    }
  }
  if (fields.search_query != nullptr) {
    if (!method.needs_search_query()) {
      findings.add_invalid("search_query", absl::StrCat("the method ", method.name, " takes none"));
    } else {
      item.search_query =
          decode_tensor(
              *fields.search_query,
              {.num_rows = item.num_rows, .num_heads = shape.num_query_heads, .dim = shape.key_dim},
              "search_query",
              findings)
              .tensor;
    }
  }
}

StatusOr<DecodedItem> decode_fields(const CallFields& fields,
                                    const OpenContext& context,
                                    const ServerTerms& terms) {
  const ContextShape& shape = context.shape();
  DecodedItem decoded;
  Findings findings;
  AttendItem& item = decoded.item;
  item.context = context.handle();
  LONGSPAN_RETURN_IF_ERROR(decode_call_method(fields, context, terms, decoded, findings));
  decode_layer(fields.layer, shape, item.layer, findings);
  item.start_pos = kLastRows;
  if (fields.start_pos != nullptr) {
    decode_position(*fields.start_pos, item.start_pos, findings);
  }
  if (fields.query == nullptr) {
    findings.add_invalid("query", "is missing");
    return findings.status();
  }
  const DecodedTensor query = decode_tensor(
      *fields.query,
      {.max_rows = fields.max_rows, .num_heads = shape.num_query_heads, .dim = shape.key_dim},
      "query",
      findings);
  if (query.tensor.data == nullptr) {
    return findings.status();  // the other tensors are measured by it
  }
  item.query = query.tensor;
  item.num_rows = query.num_rows;
  decoded.output_type = query.tensor.dtype;
  const auto output_bytes = checked_product(
      query.num_rows, shape.num_query_heads, shape.value_dim, size_of(decoded.output_type));
  if (!output_bytes ||
      static_cast<uint64_t>(*output_bytes) > terms.limits.max_message_bytes() / 2) {
    findings.add_invalid("query.shape", "has too many tokens for one message of output");
  }
  decode_keys(fields, shape, item, findings);
  decode_extras(fields, shape, item, findings);
  LONGSPAN_RETURN_IF_ERROR(findings.status());
  return decoded;
}

void set_options(const v1::AttentionOptions& options,
                 const char* method_field,
                 CallFields& fields) {
  fields.method_name = &options.method_name();
  fields.method = options.has_method() ? &options.method() : nullptr;
  fields.method_field = method_field;
}

}  // namespace

StatusOr<DecodedItem> decode_item(const v1::DecodeItem& message,
                                  const OpenContext& context,
                                  const ServerTerms& terms) {
  const uint64_t start_pos = message.start_pos();
  CallFields fields{.layer = message.layer(),
                    .start_pos = message.has_start_pos() ? &start_pos : nullptr,
                    .query = tensor_if(message.has_query(), message.query()),
                    .key = tensor_if(message.has_key(), message.key()),
                    .value = tensor_if(message.has_value(), message.value()),
                    .gates = tensor_if(message.has_gates(), message.gates()),
                    .search_query = tensor_if(message.has_search_query(), message.search_query()),
                    .max_rows = terms.limits.max_decode_rows()};
  set_options(message.options(), "options.method", fields);
  LONGSPAN_ASSIGN_OR_RETURN(DecodedItem decoded, decode_fields(fields, context, terms));
  decoded.item.phase = Phase::kDecode;
  decoded.item.return_selection = message.options().return_selection();
  decoded.return_lse = message.options().return_lse();
  decoded.num_bytes = static_cast<int64_t>(message.ByteSizeLong());
  return decoded;
}

StatusOr<DecodedItem> decode_chunk(const v1::PrefillRequest::Chunk& message,
                                   const v1::AttentionOptions& options,
                                   const OpenContext& context,
                                   const ServerTerms& terms) {
  const uint64_t start_pos = message.start_pos();
  CallFields fields{.layer = message.layer(),
                    .start_pos = &start_pos,
                    .query = tensor_if(message.has_query(), message.query()),
                    .key = tensor_if(message.has_key(), message.key()),
                    .value = tensor_if(message.has_value(), message.value()),
                    .gates = tensor_if(message.has_gates(), message.gates()),
                    .search_query = tensor_if(message.has_search_query(), message.search_query()),
                    .max_rows = terms.limits.max_prefill_rows()};
  set_options(options, "header.options.method", fields);
  LONGSPAN_ASSIGN_OR_RETURN(DecodedItem decoded, decode_fields(fields, context, terms));
  decoded.item.phase = Phase::kPrefill;
  decoded.item.return_selection = options.return_selection();
  decoded.return_lse = options.return_lse();
  decoded.num_bytes = static_cast<int64_t>(message.ByteSizeLong());
  return decoded;
}

StatusOr<DecodedItem> decode_explain(const v1::ExplainRequest& message,
                                     const OpenContext& context,
                                     const ServerTerms& terms) {
  const uint64_t start_pos = message.start_pos();
  const CallFields fields{
      .layer = message.layer(),
      .start_pos = message.has_start_pos() ? &start_pos : nullptr,
      .query = tensor_if(message.has_query(), message.query()),
      .gates = tensor_if(message.has_gates(), message.gates()),
      .search_query = tensor_if(message.has_search_query(), message.search_query()),
      .method_name = &message.method_name(),
      .method = message.has_method() ? &message.method() : nullptr,
      .method_field = "method",
      .max_rows = terms.limits.max_decode_rows()};
  LONGSPAN_ASSIGN_OR_RETURN(DecodedItem decoded, decode_fields(fields, context, terms));
  decoded.item.phase = Phase::kDecode;
  decoded.item.return_selection = true;
  decoded.item.compare_with_dense = message.compare_with_dense();
  decoded.num_bytes = static_cast<int64_t>(message.ByteSizeLong());
  return decoded;
}

StatusOr<DecodedWrite> decode_write(const v1::AppendRequest::Chunk& message,
                                    const OpenContext& context,
                                    const ServerTerms& terms) {
  const ContextShape& shape = context.shape();
  Findings findings;
  DecodedWrite write;
  decode_layer(message.layer(), shape, write.layer, findings);
  decode_position(message.start_pos(), write.start_pos, findings);
  if (message.key().raw().size() + message.value().raw().size() > terms.limits.max_chunk_bytes()) {
    findings.add_invalid("key.raw",
                         absl::StrCat("keys and values of a chunk must have at most ",
                                      terms.limits.max_chunk_bytes(),
                                      " bytes together"));
    return findings.status();
  }
  const DecodedTensor key = decode_tensor(message.key(),
                                          {.max_rows = std::numeric_limits<int64_t>::max(),
                                           .num_heads = shape.num_kv_heads,
                                           .dim = shape.key_dim,
                                           .stored_as = shape.kv_dtype},
                                          "key",
                                          findings);
  if (key.tensor.data != nullptr) {
    write.key = key.tensor;
    write.num_rows = key.num_rows;
    write.value = decode_tensor(message.value(),
                                {.num_rows = key.num_rows,
                                 .num_heads = shape.num_kv_heads,
                                 .dim = shape.value_dim,
                                 .stored_as = shape.kv_dtype},
                                "value",
                                findings)
                      .tensor;
  }
  LONGSPAN_RETURN_IF_ERROR(findings.status());
  return write;
}

void encode_outputs(const AttendResult& result,
                    const DecodedItem& item,
                    const ContextShape& shape,
                    v1::Tensor& output,
                    v1::Tensor* lse) {
  const int64_t rows = item.item.num_rows;
  encode_tensor(
      result.out, {rows, shape.num_query_heads, shape.value_dim}, item.output_type, output);
  if (lse != nullptr) {
    encode_tensor(result.lse, {rows, shape.num_query_heads}, DataType::kFloat32, *lse);
  }
}

void encode_selection(const RowSelection& selection, v1::RowSelection& message) {
  message.set_position(static_cast<uint64_t>(selection.position));
  message.set_query_head(static_cast<uint32_t>(selection.query_head));
  message.set_branch(static_cast<uint32_t>(selection.branch));
  message.set_num_tokens(static_cast<uint64_t>(selection.num_tokens));
  for (const SelectedSpan& span : selection.spans) {
    v1::SelectedSpan& encoded = *message.add_spans();
    encoded.set_rank(static_cast<uint32_t>(span.rank));
    encoded.set_begin(static_cast<uint64_t>(span.begin));
    encoded.set_end(static_cast<uint64_t>(span.end));
    if (span.score) {
      encoded.set_score(*span.score);
    }
    if (span.mass) {
      encoded.set_mass(*span.mass);
    }
  }
}

}  // namespace longspan
