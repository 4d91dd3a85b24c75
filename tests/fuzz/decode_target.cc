#include "tests/fuzz/decode_target.h"

#include <algorithm>
#include <iterator>
#include <memory>

#include "google/protobuf/stubs/logging.h"
#include "google/protobuf/text_format.h"

#include "base/error_details.h"
#include "base/rpc.h"
#include "worker/call_codec.h"
#include "worker/method_codec.h"
#include "worker/spec_codec.h"

namespace longspan {
namespace {

constexpr char kSpec[] = R"(
  num_layers: 2 num_query_heads: 4 num_kv_heads: 2 key_head_dim: 64 value_head_dim: 80
  kv_dtype: DATA_TYPE_FP16 max_tokens: 4096 scale: 0.5 sink_logits: [0, 1, 2, 3]
  labels { key: "a" value: "b" } ttl { seconds: 3 } layout { kind: KIND_ZIGZAG }
  methods { name: "dense" branches { selection { kind: KIND_ALL } } }
  methods {
    name: "gated"
    branches { source: SOURCE_SUMMARIES
               summary { kind: KIND_COMPRESSED window_tokens: 32 stride_tokens: 16 } }
    branches { summary { kind: KIND_COMPRESSED window_tokens: 32 stride_tokens: 16 }
               search { normalise: NORMALISE_SOFTMAX head_reduce: HEAD_REDUCE_GROUP_SUM
                        block_reduce: BLOCK_REDUCE_OVERLAP_SUM }
               selection { kind: KIND_TOP_K block_tokens: 64 forced_within_budget: true }
               budget { both { blocks: 16 } } }
    branches { mask { window_tokens: 512 } }
    merge { kind: KIND_GATES }
  }
  methods {
    name: "spans"
    branches { search { query: QUERY_SUPPLIED view: VIEW_ANCHOR
                        anchors { power: 0.55 first_stripe: 65 } }
               selection { kind: KIND_TOP_K spans { power: 0.5 backward: 3 forward: 1 } }
               budget { both { blocks: 3 } } }
    merge { kind: KIND_SPAN_SCORES }
  })";

v1::ContextSpec make_spec() {
  v1::ContextSpec spec;
  LONGSPAN_CHECK(google::protobuf::TextFormat::ParseFromString(kSpec, &spec));
  return spec;
}

// A server's terms and one of its contexts.
struct Fixture {
  Fixture() {
    google::protobuf::SetLogHandler(nullptr);  // it writes a line for each broken string
    terms.limits.set_max_message_bytes(1 << 20);
    terms.limits.set_max_chunk_bytes(1 << 18);
    terms.limits.set_max_context_tokens(1 << 20);
    terms.limits.set_max_layers(64);
    terms.limits.set_max_query_heads(64);
    terms.limits.set_max_prefill_rows(64);
    terms.limits.set_max_decode_rows(16);
    terms.num_ranks = 3;
    terms.backend = backend.get();
    Findings findings;
    DecodedSpec spec = decode_spec(make_spec(), terms, findings);
    LONGSPAN_CHECK(findings.empty());
    context = std::make_unique<OpenContext>("c", 1, std::move(spec.shape), 1);
  }

  std::unique_ptr<Backend> backend = *make_backend("reference", {});
  ServerTerms terms;
  std::unique_ptr<OpenContext> context;
};

// Errors are part of what is sent back: they are built as well.
void report(const Status& status) {
  const Status received = from_grpc_status(to_grpc_status(status));
  LONGSPAN_CHECK(received.code() == status.code());
}

template <class Message, class Decode>
void parse_and(const grpc::ByteBuffer& bytes, const Decode& decode) {
  Message message;
  const Status status = parse_message(bytes, message);
  report(status.ok() ? decode(message) : status);
}

void decode_call(const grpc::ByteBuffer& bytes, int kind, const Fixture& fixture) {
  const OpenContext& context = *fixture.context;
  switch (kind) {
    case 0:
      parse_and<v1::DecodeItem>(bytes, [&](const v1::DecodeItem& message) {
        return decode_item(message, context, fixture.terms).status();
      });
      return;
    case 1:
      parse_and<v1::PrefillRequest>(bytes, [&](const v1::PrefillRequest& message) {
        return decode_chunk(message.chunk(), message.header().options(), context, fixture.terms)
            .status();
      });
      return;
    case 2:
      parse_and<v1::ExplainRequest>(bytes, [&](const v1::ExplainRequest& message) {
        return decode_explain(message, context, fixture.terms).status();
      });
      return;
    default:
      parse_and<v1::AppendRequest>(bytes, [&](const v1::AppendRequest& message) {
        return decode_write(message.chunk(), context, fixture.terms).status();
      });
  }
}

std::vector<uint8_t> seed(uint8_t kind, const google::protobuf::Message& message) {
  const std::string bytes = message.SerializeAsString();
  std::vector<uint8_t> input(1 + bytes.size(), kind);
  std::copy(bytes.begin(), bytes.end(), std::next(input.begin()));
  return input;
}

void fill(v1::Tensor& tensor, int64_t rows, int64_t heads, int64_t dim) {
  tensor.set_dtype(v1::DATA_TYPE_FP32);
  for (const int64_t size : {rows, heads, dim}) {
    tensor.add_shape(size);
  }
  tensor.set_raw(std::string(static_cast<size_t>(rows * heads * dim * 4), '\x11'));
}

}  // namespace

void decode_anything(std::span<const uint8_t> input) {
  static const Fixture& fixture = *new Fixture;
  if (input.empty()) {
    return;
  }
  const grpc::Slice slice(input.data() + 1, input.size() - 1);
  const grpc::ByteBuffer bytes(&slice, 1);
  const int kind = input.front() % 7;
  if (kind < 4) {
    decode_call(bytes, kind, fixture);
  } else if (kind == 4) {
    parse_and<v1::ContextSpec>(bytes, [&](const v1::ContextSpec& message) {
      Findings findings;
      const DecodedSpec decoded = decode_spec(message, fixture.terms, findings);
      if (findings.empty()) {
        effective_spec(message, decoded);
        summary_bytes_per_token(decoded.shape);
      }
      return findings.status();
    });
  } else if (kind == 5) {
    parse_and<v1::Method>(bytes, [&](const v1::Method& message) {
      Findings findings;
      const Method method = decode_method(message, "method", findings);
      return findings.empty() ? check_support(*fixture.backend, fixture.context->shape(), method)
                              : findings.status();
    });
  } else {
    report(from_grpc_status(grpc::Status(
        grpc::StatusCode::ABORTED,
        "",
        std::string(reinterpret_cast<const char*>(input.data()) + 1, input.size() - 1))));
  }
}

std::vector<std::vector<uint8_t>> decode_seeds() {
  std::vector<std::vector<uint8_t>> seeds;
  v1::DecodeItem item;
  item.set_context_id("c");
  item.set_layer(1);
  item.set_start_pos(7);
  item.mutable_options()->set_method_name("spans");
  fill(*item.mutable_query(), 1, 4, 64);
  fill(*item.mutable_key(), 1, 2, 64);
  fill(*item.mutable_value(), 1, 2, 80);
  fill(*item.mutable_search_query(), 1, 4, 64);
  seeds.push_back(seed(0, item));

  v1::PrefillRequest prefill;
  prefill.mutable_chunk()->set_layer(1);
  *prefill.mutable_chunk()->mutable_query() = item.query();
  fill(*prefill.mutable_chunk()->mutable_gates(), 1, 4, 3);
  seeds.push_back(seed(1, prefill));

  v1::ExplainRequest explain;
  *explain.mutable_query() = item.query();
  *explain.mutable_method() = make_spec().methods(1);
  explain.set_compare_with_dense(true);
  seeds.push_back(seed(2, explain));

  v1::AppendRequest append;
  append.mutable_chunk()->set_start_pos(3);
  *append.mutable_chunk()->mutable_key() = item.key();
  *append.mutable_chunk()->mutable_value() = item.value();
  seeds.push_back(seed(3, append));

  const v1::ContextSpec spec = make_spec();
  seeds.push_back(seed(4, spec));
  for (const v1::Method& method : spec.methods()) {
    seeds.push_back(seed(5, method));
  }
  seeds.push_back(seed(6, to_rpc_status(invalid_argument("a.b", "c"))));
  return seeds;
}

}  // namespace longspan
