// The calls of the data plane, from messages to the items of a step and back. Decoded items point
// into their messages, which must outlive the step.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"

#include "longspan/v1/attention.pb.h"
#include "longspan/v1/introspect.pb.h"

#include "base/status.h"
#include "worker/group.h"
#include "worker/open_context.h"
#include "worker/spec_codec.h"

namespace longspan {

// The position "the last rows of the layer", to be resolved when the item runs.
inline constexpr int64_t kLastRows = -1;

// One item, and what its answer needs to know.
struct DecodedItem {
  AttendItem item;                        // `method` points into the context or at `inline_method`
  std::unique_ptr<Method> inline_method;  // given in full with the call
  bool return_lse = false;
  DataType output_type = DataType::kFloat32;
  int64_t num_bytes = 0;  // of the message, for the queue's bound
};

// INVALID_ARGUMENT, UNIMPLEMENTED (each with every reason), NOT_FOUND for an unknown method.
StatusOr<DecodedItem> decode_item(const v1::DecodeItem& message,
                                  const OpenContext& context,
                                  const ServerTerms& terms);
StatusOr<DecodedItem> decode_chunk(const v1::PrefillRequest::Chunk& message,
                                   const v1::AttentionOptions& options,
                                   const OpenContext& context,
                                   const ServerTerms& terms);
StatusOr<DecodedItem> decode_explain(const v1::ExplainRequest& message,
                                     const OpenContext& context,
                                     const ServerTerms& terms);

struct DecodedWrite {
  int layer = 0;
  int64_t start_pos = 0;
  int64_t num_rows = 0;
  TensorIn key;
  TensorIn value;
};
StatusOr<DecodedWrite> decode_write(const v1::AppendRequest::Chunk& message,
                                    const OpenContext& context,
                                    const ServerTerms& terms);

// Output and log-sum-exp in the shape of the query.
void encode_outputs(const AttendResult& result,
                    const DecodedItem& item,
                    const ContextShape& shape,
                    v1::Tensor& output,
                    v1::Tensor* lse);
void encode_selection(const RowSelection& selection, v1::RowSelection& message);

}  // namespace longspan
