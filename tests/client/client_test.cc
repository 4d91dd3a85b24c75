// The C++ client library against a real server.
#include "client/cpp/client.h"

#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "client/cpp/errors.h"
#include "tests/client/server_process.h"

namespace longspan::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

constexpr int64_t kHeads = 4;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kDim = 64;
constexpr double kTolerance = 1e-5;  // fp32 caches

// [tokens][heads][dim].
struct Matrix {
  int64_t tokens = 0;
  int64_t heads = 0;
  std::vector<float> elements;

  Rows rows() const { return {DataType::kFloat32, elements.data(), tokens, heads, kDim}; }
  const float* row(int64_t token, int64_t head) const {
    return &elements[static_cast<size_t>((token * heads + head) * kDim)];
  }
};

// Attention of the query at `position`, naively in double precision: [heads][dim].
std::vector<double> attend(
    const Matrix& query, int64_t token, const Matrix& key, const Matrix& value, int64_t position) {
  std::vector<double> output(static_cast<size_t>(kHeads * kDim), 0.0);
  for (int64_t head = 0; head < kHeads; ++head) {
    const int64_t kv_head = head / (kHeads / kKvHeads);
    double sum = 0;
    for (int64_t other = 0; other <= position; ++other) {
      double score = 0;
      for (int64_t channel = 0; channel < kDim; ++channel) {
        score += double{query.row(token, head)[channel]} * key.row(other, kv_head)[channel];
      }
      const double weight = std::exp(score / std::sqrt(double{kDim}));
      sum += weight;
      for (int64_t channel = 0; channel < kDim; ++channel) {
        output[static_cast<size_t>(head * kDim + channel)] +=
            weight * value.row(other, kv_head)[channel];
      }
    }
    for (int64_t channel = 0; channel < kDim; ++channel) {
      output[static_cast<size_t>(head * kDim + channel)] /= sum;
    }
  }
  return output;
}

double relative_error(const std::vector<float>& actual,
                      size_t begin,
                      const std::vector<double>& expected) {
  double difference = 0;
  double norm = 0;
  for (size_t index = 0; index < expected.size(); ++index) {
    difference += std::pow(actual.at(begin + index) - expected[index], 2);
    norm += std::pow(expected[index], 2);
  }
  return std::sqrt(difference / norm);
}

class ClientTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    server = new longspan::testing::ServerProcess({"--ranks", "2", "--kv-capacity", "256MiB"});
  }
  static void TearDownTestSuite() {
    EXPECT_EQ(server->terminate(), 0);
    delete server;
  }

  ClientTest() {
    const char* given = std::getenv("LONGSPAN_TEST_SEED");
    const uint64_t seed =
        given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
    RecordProperty("seed", std::to_string(seed));
    std::printf("LONGSPAN_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
    generator_.seed(seed);
  }

  Matrix random(int64_t tokens, int64_t heads) {
    Matrix matrix{tokens, heads, std::vector<float>(static_cast<size_t>(tokens * heads * kDim))};
    std::normal_distribution<float> normal;
    for (float& element : matrix.elements) {
      element = normal(generator_);
    }
    return matrix;
  }

  static v1::ContextSpec spec() {
    v1::ContextSpec spec;
    spec.set_num_layers(2);
    spec.set_num_query_heads(kHeads);
    spec.set_num_kv_heads(kKvHeads);
    spec.set_key_head_dim(kDim);
    spec.set_kv_dtype(v1::DATA_TYPE_FP32);
    return spec;
  }

  Context create() {
    auto context = client_.create_context(spec());
    EXPECT_TRUE(context.ok()) << context.status();
    return *context;
  }

  // Layer 0 of `context` holds `tokens` of key_ and value_.
  void fill(const Context& context, int64_t tokens) {
    key_ = random(tokens, kKvHeads);
    value_ = random(tokens, kKvHeads);
    const auto response = context.append(0, 0, key_.rows(), value_.rows());
    ASSERT_TRUE(response.ok()) << response.status();
    EXPECT_THAT(response->layer_lengths(), ElementsAre(tokens, 0));
  }

  static longspan::testing::ServerProcess* server;
  std::mt19937_64 generator_;
  Client client_{server->address()};
  Matrix key_;
  Matrix value_;
};

longspan::testing::ServerProcess* ClientTest::server = nullptr;

TEST_F(ClientTest, TellsWhatTheServerIs) {
  const auto capabilities = client_.capabilities();
  ASSERT_TRUE(capabilities.ok()) << capabilities.status();
  EXPECT_EQ(capabilities->num_ranks(), 2);
  EXPECT_GT(capabilities->methods_size(), 0);

  v1::ContextSpec wrong = spec();
  wrong.set_num_kv_heads(3);
  const auto check = client_.check_spec(wrong);
  ASSERT_TRUE(check.ok()) << check.status();
  ASSERT_EQ(check->reasons_size(), 1);
  EXPECT_THAT(check->reasons(0).field(), HasSubstr("num_kv_heads"));
}

TEST_F(ClientTest, PrefillThenDecodeEqualsNaiveAttention) {
  const Context context = create();
  const Matrix query = random(100, kHeads);
  const Matrix key = random(100, kKvHeads);
  const Matrix value = random(100, kKvHeads);
  const AttentionRows all{.query = query.rows(), .key = key.rows(), .value = value.rows()};

  const auto prefill = context.prefill(1, 0, all.cut(0, 99));
  ASSERT_TRUE(prefill.ok()) << prefill.status();
  ASSERT_EQ(prefill->size(), 1U);
  const auto output = to_floats((*prefill)[0].output());
  ASSERT_TRUE(output.ok()) << output.status();
  for (int64_t token = 0; token < 99; ++token) {
    const auto expected = attend(query, token, key, value, token);
    EXPECT_LE(relative_error(*output, static_cast<size_t>(token * kHeads * kDim), expected),
              kTolerance);
  }

  const auto decode = context.decode(1, 99, all.cut(99, 100));
  ASSERT_TRUE(decode.ok()) << decode.status();
  EXPECT_EQ(decode->layer_length(), 100);
  const auto last = to_floats(decode->output());
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_LE(relative_error(*last, 0, attend(query, 99, key, value, 99)), kTolerance);
}

TEST_F(ClientTest, AnAppendStreamShowsEverythingAtItsEnd) {
  const Context context = create();
  const Matrix key = random(3000, kKvHeads);
  const Matrix value = random(3000, kKvHeads);
  {
    const auto broken = context.append_stream();
    ASSERT_TRUE(broken->write(0, 0, key.rows(), value.rows()).ok());
  }
  // Until the server has noticed the broken one, it refuses another, with a delay for the retry.
  std::unique_ptr<AppendStream> stream;
  v1::AppendResponse response;
  const Status status = Retries{}.call([&](grpc::ClientContext&) -> Status {
    stream = context.append_stream();
    for (uint32_t layer = 0; layer < 2; ++layer) {
      LONGSPAN_RETURN_IF_ERROR(stream->write(layer, 0, key.rows(), value.rows()));
    }
    EXPECT_EQ(context.info()->committed_length(), 0);
    LONGSPAN_ASSIGN_OR_RETURN(response, stream->finish());
    return absl::OkStatus();
  });
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(response.committed_length(), 3000);
  EXPECT_TRUE(absl::IsFailedPrecondition(stream->finish().status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(stream->write(0, 0, key.rows(), value.rows())));
}

TEST_F(ClientTest, ADecodeStreamAnswersInOrder) {
  const Context context = create();
  fill(context, 70);
  const auto stream = client_.decode_stream(std::vector{context.id()}, 2);
  ASSERT_TRUE(stream.ok()) << stream.status();
  EXPECT_EQ((*stream)->window(), 2);
  std::vector<Matrix> queries;
  for (int step = 0; step < 2; ++step) {
    queries.push_back(random(1, kHeads));
    ASSERT_TRUE(
        (*stream)->send({context.decode_item(0, -1, {.query = queries.back().rows()})}).ok());
  }
  EXPECT_TRUE(absl::IsResourceExhausted((*stream)->send({})));
  for (const Matrix& query : queries) {
    const auto results = (*stream)->receive();
    ASSERT_TRUE(results.ok()) << results.status();
    ASSERT_EQ(results->size(), 1U);
    const auto output = to_floats((*results)[0].output());
    ASSERT_TRUE(output.ok()) << output.status();
    EXPECT_LE(relative_error(*output, 0, attend(query, 0, key_, value_, 69)), kTolerance);
  }
  EXPECT_TRUE(absl::IsFailedPrecondition((*stream)->receive().status()));
  EXPECT_TRUE((*stream)->finish().ok());
}

TEST_F(ClientTest, APrefillStreamSurvivesABadChunk) {
  const Context context = create();
  fill(context, 10);
  const Matrix query = random(1, kHeads);
  const Matrix key = random(1, kKvHeads);
  const AttentionRows rows{.query = query.rows(), .key = key.rows(), .value = key.rows()};
  const auto stream = context.prefill_stream();
  ASSERT_TRUE(stream->send(0, 99, rows).ok());
  const auto gap = stream->receive();
  EXPECT_EQ(gap.status().code(), absl::StatusCode::kOutOfRange) << gap.status();
  EXPECT_THAT(error_metadata(gap.status()), ::testing::Contains(Pair("expected_pos", "10")));
  ASSERT_TRUE(stream->send(0, 10, rows).ok());
  EXPECT_TRUE(stream->receive().ok());
  EXPECT_TRUE(stream->finish().ok());
}

TEST_F(ClientTest, ItemsOfABatchFailOnTheirOwn) {
  const Context context = create();
  fill(context, 5);
  const Matrix query = random(1, kHeads);
  const AttentionRows rows{.query = query.rows()};
  const auto results = client_.decode(
      {client_.context("nowhere").decode_item(0, -1, rows), context.decode_item(0, -1, rows)});
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_TRUE(absl::IsNotFound(from_rpc((*results)[0].status())));
  EXPECT_TRUE(from_rpc((*results)[1].status()).ok());
}

TEST_F(ClientTest, ForksTruncatesListsAndDeletes) {
  const Context context = create();
  key_ = random(90, kKvHeads);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    ASSERT_TRUE(context.append(layer, 0, key_.rows(), key_.rows()).ok());
  }
  const auto child = context.fork(80, "child");
  ASSERT_TRUE(child.ok()) << child.status();
  EXPECT_EQ(child->info()->committed_length(), 80);
  EXPECT_EQ(context.truncate(64)->committed_length(), 64);
  EXPECT_TRUE(absl::IsAborted(context.truncate(1, 999'999).status()));

  const auto all = client_.contexts();
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_GE(all->size(), 2U);
  EXPECT_FALSE(context.keep_alive()->has_remaining());

  EXPECT_TRUE(context.remove().ok());
  EXPECT_TRUE(absl::IsNotFound(context.remove()));
  EXPECT_TRUE(context.remove(true).ok());
  EXPECT_TRUE(child->remove().ok());
}

TEST_F(ClientTest, ExplainsAgainstDense) {
  const Context context = create();
  fill(context, 120);
  v1::ExplainRequest request;
  request.set_compare_with_dense(true);
  const Matrix query = random(1, kHeads);
  fill_rows({.query = query.rows()}, request);
  const auto response = context.explain(request);
  ASSERT_TRUE(response.ok()) << response.status();
  ASSERT_EQ(response->recall_size(), kHeads);
  EXPECT_NEAR(response->recall(0), 1.0, 1e-3);
  EXPECT_NEAR(response->read_fraction(), 1.0, 1e-9);
}

TEST_F(ClientTest, ErrorsCarryTheirDetails) {
  const Context context = create();
  fill(context, 5);
  Matrix query = random(1, kHeads);
  query.elements[3] = std::nanf("");
  const auto refused = context.decode(0, -1, {.query = query.rows()});
  EXPECT_TRUE(absl::IsInvalidArgument(refused.status())) << refused.status();
  EXPECT_FALSE(error_reason(refused.status()).empty());
  ASSERT_FALSE(field_violations(refused.status()).empty());
  EXPECT_THAT(field_violations(refused.status())[0].field, HasSubstr("query"));
  EXPECT_FALSE(is_retryable(refused.status()));
}

TEST(ClientWithoutServerTest, SaysUnavailableWhenTimeIsUp) {
  Client client("localhost:1", {.timeout = std::chrono::seconds(60), .retry_for = {}});
  const auto refused = client.capabilities();
  EXPECT_TRUE(absl::IsUnavailable(refused.status())) << refused.status();
  EXPECT_TRUE(is_retryable(refused.status()));
}

}  // namespace
}  // namespace longspan::client
