// From messages to structs: tensors element by element, methods field by field, every finding.
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "google/protobuf/text_format.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "worker/method_codec.h"
#include "worker/spec_codec.h"
#include "worker/tensor_codec.h"

namespace longspan {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

std::vector<std::string> fields(const std::vector<FieldError>& errors) {
  std::vector<std::string> found;
  found.reserve(errors.size());
  for (const FieldError& error : errors) {
    found.push_back(error.field);
  }
  return found;
}

std::mt19937 make_random() {
  const char* given = std::getenv("LONGSPAN_TEST_SEED");
  const unsigned seed =
      given != nullptr ? static_cast<unsigned>(std::atoi(given)) : std::random_device()();
  std::printf("LONGSPAN_TEST_SEED=%u\n", seed);
  return std::mt19937(seed);
}

v1::Method parse(const std::string& text) {
  v1::Method message;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &message)) << text;
  return message;
}

// Whether a bit pattern of one type is finite once it is stored as another, by the conversions
// themselves.
bool is_storable(DataType type, uint32_t bits, DataType stored_as) {
  uint32_t stored = 0;
  const float value = load_element(type, &bits, 0);
  store_element(stored_as, &stored, 0, value);
  return std::isfinite(value) && std::isfinite(load_element(stored_as, &stored, 0));
}

TEST(TensorCodec, FindsExactlyWhatCannotBeStored) {
  std::mt19937 random = make_random();
  constexpr DataType kTypes[] = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16};
  for (const DataType type : kTypes) {
    for (const DataType stored_as : kTypes) {
      for (int round = 0; round < 200'000; ++round) {
        uint32_t bits = random();
        if (type != DataType::kFloat32) {
          bits &= 0xffffU;
        } else if (round % 2 == 0) {
          // Around the largest values that fp16 and bf16 can hold.
          bits = (round % 4 == 0 ? 0x477ff000U : 0x7f7f8000U) + random() % 64 - 32;
        }
        const bool found = first_unstorable({type, &bits}, 1, stored_as) == 0;
        ASSERT_EQ(found, !is_storable(type, bits, stored_as))
            << to_string(type) << " " << std::hex << bits << " as " << to_string(stored_as);
      }
    }
  }
}

TEST(TensorCodec, NamesTheFirstBadElement) {
  std::vector<float> values(1000, 1.0F);
  EXPECT_EQ(first_unstorable({DataType::kFloat32, values.data()}, 1000, DataType::kFloat32), -1);
  values[999] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(first_unstorable({DataType::kFloat32, values.data()}, 1000, DataType::kFloat32), 999);
  EXPECT_EQ(first_unstorable({DataType::kFloat32, values.data()}, 999, DataType::kFloat32), -1);
  values[3] = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(first_unstorable({DataType::kFloat32, values.data()}, 1000, DataType::kFloat32), 3);
}

TEST(TensorCodec, SizesThatOverflowAreRefusedBeforeAnythingIsRead) {
  v1::Tensor message;
  message.set_dtype(v1::DATA_TYPE_FP32);
  for (const int64_t size : {int64_t{1} << 62, int64_t{1} << 62, int64_t{4}}) {
    message.add_shape(size);
  }
  message.set_raw("1234");
  Findings findings;
  const TensorRule rule{
      .max_rows = std::numeric_limits<int64_t>::max(), .num_heads = int64_t{1} << 62, .dim = 4};
  EXPECT_EQ(decode_tensor(message, rule, "key", findings).tensor.data, nullptr);
  EXPECT_THAT(fields(findings.invalid), ElementsAre("key.raw"));
}

TEST(TensorCodec, EncodesWhatItDecodes) {
  const std::vector<float> values{0.0F, 1.0F, -2.5F, 65504.0F, 6e-8F, -0.0F};
  for (const DataType type : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    v1::Tensor message;
    encode_tensor(values, {1, 2, 3}, type, message);
    Findings findings;
    const DecodedTensor decoded =
        decode_tensor(message, {.max_rows = 9, .num_heads = 2, .dim = 3}, "output", findings);
    ASSERT_TRUE(findings.empty());
    ASSERT_EQ(decoded.num_rows, 1);
    ASSERT_EQ(decoded.tensor.dtype, type);
    for (size_t i = 0; i < values.size(); ++i) {
      const float expected = type == DataType::kFloat32 ? values[i]
                             : type == DataType::kFloat16
                                 ? float16_to_float(float_to_float16(values[i]))
                                 : bfloat16_to_float(float_to_bfloat16(values[i]));
      EXPECT_EQ(load_element(type, decoded.tensor.data, i), expected);
    }
  }
}

TEST(MethodCodec, TakesEveryServedField) {
  const v1::Method message = parse(R"(
    name: "everything"
    branches {
      name: "compressed" source: SOURCE_SUMMARIES
      summary { kind: KIND_COMPRESSED window_tokens: 2 stride_tokens: 1 pooling: POOLING_WEIGHTED
                key_weights: 0.25 key_weights: 0.75 value_weights: 0.5 value_weights: 0.5 }
    }
    branches {
      name: "selected"
      summary { kind: KIND_COMPRESSED window_tokens: 32 stride_tokens: 16 }
      search { normalise: NORMALISE_SOFTMAX head_reduce: HEAD_REDUCE_GROUP_SUM
               block_reduce: BLOCK_REDUCE_OVERLAP_SUM }
      selection { kind: KIND_TOP_K block_tokens: 64 forced_first_blocks: 1 forced_last_blocks: 2
                  forced_within_budget: true }
      budget { both { blocks: 16 } decode { tokens: 640 min_blocks: 3 max_blocks: 99 } }
    }
    branches { name: "window" mask { window_tokens: 512 sink_tokens: 4 } }
    merge { kind: KIND_GATES }
    roles { dense_layers: [0, 31] dense_phase: PHASE_PREFILL dense_below_tokens: 8192 })");
  Findings findings;
  const Method method = decode_method(message, "", findings);
  EXPECT_THAT(fields(findings.invalid), IsEmpty());
  EXPECT_THAT(fields(findings.unserved), IsEmpty());
  ASSERT_EQ(method.branches.size(), 3U);
  EXPECT_EQ(method.branches[0].source, BranchSource::kSummaries);
  EXPECT_THAT(method.branches[0].summary.key_weights, ElementsAre(0.25F, 0.75F));
  const Branch& selected = method.branches[1];
  EXPECT_EQ(selected.summary.stride(), 16);
  EXPECT_EQ(selected.search.normalise, Normalise::kSoftmax);
  EXPECT_EQ(selected.search.head_reduce, HeadReduce::kGroupSum);
  EXPECT_EQ(selected.selection.forced_last_blocks, 2);
  EXPECT_TRUE(selected.selection.forced_within_budget);
  EXPECT_EQ(selected.budget.prefill, (Amount{.kind = Amount::Kind::kBlocks, .value = 16}));
  EXPECT_EQ(
      selected.budget.decode,
      (Amount{.kind = Amount::Kind::kTokens, .value = 640, .min_blocks = 3, .max_blocks = 99}));
  EXPECT_EQ(method.branches[2].mask, (StaticMask{512, 4}));
  EXPECT_EQ(method.merge, MergeKind::kGates);
  EXPECT_THAT(method.dense_layers, ElementsAre(0, 31));
  EXPECT_TRUE(method.dense_prefill);
  EXPECT_FALSE(method.dense_decode);
  EXPECT_EQ(method.dense_below_tokens, 8192);
}

TEST(MethodCodec, PowersBecomeFractions) {
  const v1::Method message = parse(R"(
    name: "spans"
    branches {
      search { query: QUERY_SUPPLIED view: VIEW_ANCHOR anchors { power: 0.55 first_stripe: 65 } }
      selection { kind: KIND_TOP_K spans { power: 0.5 backward: 3 forward: 0.2 } }
      budget { both { blocks: 3 } }
    }
    merge { kind: KIND_SPAN_SCORES })");
  Findings findings;
  const Method method = decode_method(message, "", findings);
  ASSERT_TRUE(findings.empty()) << findings.status();
  EXPECT_EQ(method.branches[0].search.anchor_power, (Rational{11, 20}));
  EXPECT_EQ(method.branches[0].search.anchor_first_stripe, 65);
  EXPECT_EQ(method.branches[0].selection.span_forward, (Rational{1, 5}));
  v1::Method odd = message;
  odd.mutable_branches(0)->mutable_search()->mutable_anchors()->set_power(
      std::numeric_limits<double>::quiet_NaN());
  decode_method(odd, "methods[3]", findings);
  EXPECT_THAT(fields(findings.invalid), ElementsAre("methods[3].branches[0].search.anchors.power"));
}

TEST(MethodCodec, UnknownValuesAreInvalidAndKnownOnesUnserved) {
  v1::Method message = parse(R"(name: "m" branches { selection { kind: KIND_CLUSTER } })");
  message.mutable_branches(0)->mutable_summary()->set_kind(static_cast<v1::Summary::Kind>(99));
  Findings findings;
  decode_method(message, "method", findings);
  EXPECT_THAT(fields(findings.invalid), ElementsAre("method.branches[0].summary.kind"));
  EXPECT_THAT(fields(findings.unserved), ElementsAre("method.branches[0].selection.kind"));
  EXPECT_TRUE(absl::IsInvalidArgument(findings.status())) << "what is wrong comes first";
}

TEST(MethodCodec, EveryValueOfEveryEnumerationIsTakenOrNamed) {
  // A value that is neither served nor refused would be silently taken for another.
  const auto descriptor = v1::Search::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const auto* field = descriptor->field(i);
    if (field->enum_type() == nullptr) {
      continue;
    }
    for (int j = 0; j < field->enum_type()->value_count(); ++j) {
      v1::Method message = parse(R"(name: "m" branches { selection { kind: KIND_ALL } })");
      auto* search = message.mutable_branches(0)->mutable_search();
      search->GetReflection()->SetEnum(search, field, field->enum_type()->value(j));
      Findings findings;
      const Method method = decode_method(message, "", findings);
      const bool is_default = method.branches[0].search == SearchSpec() || !findings.empty();
      EXPECT_TRUE(is_default || j > 1) << field->enum_type()->value(j)->full_name();
      if (j > 1 && findings.empty()) {
        EXPECT_NE(method.branches[0].search, SearchSpec())
            << field->enum_type()->value(j)->full_name() << " has no effect";
      }
    }
  }
}

TEST(MethodCodec, TheDenseMessageIsTheDenseMethod) {
  Findings findings;
  EXPECT_EQ(decode_method(encode_dense_method(), "", findings), dense_method());
  EXPECT_TRUE(findings.empty());
}

class SpecCodecTest : public testing::Test {
 protected:
  SpecCodecTest() : backend_(*make_backend("reference", {})) {
    terms_.limits.set_max_layers(100);
    terms_.limits.set_max_query_heads(64);
    terms_.limits.set_max_context_tokens(1 << 20);
    terms_.num_ranks = 4;
    terms_.backend = backend_.get();
    spec_.set_num_layers(3);
    spec_.set_num_query_heads(8);
    spec_.set_num_kv_heads(2);
    spec_.set_key_head_dim(64);
  }

  DecodedSpec decode() {
    findings_ = Findings();
    return decode_spec(spec_, terms_, findings_);
  }

  std::unique_ptr<Backend> backend_;
  ServerTerms terms_;
  v1::ContextSpec spec_;
  Findings findings_;
};

TEST_F(SpecCodecTest, FillsInWhatIsLeftOpen) {
  const DecodedSpec decoded = decode();
  ASSERT_TRUE(findings_.empty()) << findings_.status();
  EXPECT_EQ(decoded.shape.value_dim, 64);
  EXPECT_EQ(decoded.shape.kv_dtype, DataType::kBFloat16);
  EXPECT_FLOAT_EQ(decoded.shape.scale, 0.125F);
  EXPECT_EQ(decoded.shape.methods, std::vector<Method>{dense_method()});
  EXPECT_EQ(decoded.shape.max_tokens, 1 << 20);
  EXPECT_EQ(decoded.shape.layout.num_ranks, 4);
  EXPECT_EQ(kv_bytes_per_token(decoded.shape), 3 * 2 * (64 + 64) * 2);
  EXPECT_EQ(summary_bytes_per_token(decoded.shape), 0.0);
  // Asking for exactly what was decided decides the same.
  const v1::ContextSpec effective = effective_spec(spec_, decoded);
  spec_ = effective;
  const v1::ContextSpec again = effective_spec(spec_, decode());
  EXPECT_TRUE(findings_.empty()) << findings_.status();
  EXPECT_EQ(again.SerializeAsString(), effective.SerializeAsString());
}

TEST_F(SpecCodecTest, SummariesThatMethodsShareAreCountedOnce) {
  const std::string block = R"(branches {
      summary { kind: KIND_MIN_MAX block_tokens: 16 } search { score: SCORE_BOUND }
      selection { kind: KIND_TOP_K block_tokens: 16 } budget { both { blocks: 4 } } })";
  *spec_.add_methods() = parse("name: 'a' " + block);
  *spec_.add_methods() = parse("name: 'b' " + block);
  const DecodedSpec decoded = decode();
  ASSERT_TRUE(findings_.empty()) << findings_.status();
  EXPECT_DOUBLE_EQ(summary_bytes_per_token(decoded.shape), 3 * 2 * (2 * 64) * 2 / 16.0);
}

TEST_F(SpecCodecTest, CollectsEverything) {
  spec_.set_num_layers(0);
  spec_.set_num_query_heads(9);
  spec_.set_scale(-1);
  spec_.set_kv_dtype(v1::DATA_TYPE_FP8_E5M2);
  spec_.set_durability(v1::ContextSpec::DURABILITY_SNAPSHOT);
  spec_.set_max_tokens(uint64_t{1} << 63);
  *spec_.add_methods() = parse(R"(name: "" branches { selection { kind: KIND_TREE } })");
  decode();
  EXPECT_THAT(
      fields(findings_.invalid),
      UnorderedElementsAre("num_layers", "num_kv_heads", "scale", "max_tokens", "methods[0].name"));
  EXPECT_THAT(
      fields(findings_.unserved),
      UnorderedElementsAre("kv_dtype", "durability", "methods[0].branches[0].selection.kind"));
}

TEST_F(SpecCodecTest, BoundsOfLists) {
  for (int i = 0; i < 65; ++i) {
    *spec_.add_methods() =
        parse(absl::StrCat("name: 'm", i, "' branches { selection { kind: KIND_ALL } }"));
  }
  decode();
  EXPECT_THAT(fields(findings_.invalid), ElementsAre("methods"));
}

}  // namespace
}  // namespace longspan
