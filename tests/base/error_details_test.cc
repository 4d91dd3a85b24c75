// Details of errors: what goes over the wire, and that it fits.
#include "base/error_details.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace longspan {
namespace {

using testing::HasSubstr;

template <class Detail>
std::vector<Detail> details_of(const google::rpc::Status& status) {
  std::vector<Detail> found;
  for (const auto& any : status.details()) {
    Detail detail;
    if (any.UnpackTo(&detail)) {
      found.push_back(detail);
    }
  }
  return found;
}

TEST(ErrorDetails, EveryErrorHasAReasonAndADomain) {
  for (int code = 1; code <= 16; ++code) {
    const Status status(static_cast<absl::StatusCode>(code), "what happened");
    const auto message = to_rpc_status(status);
    EXPECT_EQ(message.code(), code);
    const auto infos = details_of<google::rpc::ErrorInfo>(message);
    ASSERT_EQ(infos.size(), 1U);
    EXPECT_FALSE(infos[0].reason().empty());
    EXPECT_EQ(infos[0].domain(), "longspan");
    EXPECT_TRUE(message.details(0).Is<google::rpc::ErrorInfo>()) << "what is cut is cut after it";
  }
}

TEST(ErrorDetails, OkStaysOk) {
  EXPECT_TRUE(with_reason(absl::OkStatus(), "X").ok());
  EXPECT_TRUE(invalid_argument(std::vector<FieldError>{}).ok());
  EXPECT_TRUE(to_grpc_status(absl::OkStatus()).ok());
  EXPECT_EQ(reason_of(absl::OkStatus()), "");
}

TEST(ErrorDetails, LibrariesNameFieldsAndPositionsInTheirOwnWay) {
  const auto field = to_rpc_status(absl::InvalidArgumentError("layout.stripe_tokens: too odd"));
  const auto requests = details_of<google::rpc::BadRequest>(field);
  ASSERT_EQ(requests.size(), 1U);
  EXPECT_EQ(requests[0].field_violations(0).field(), "layout.stripe_tokens");
  EXPECT_EQ(requests[0].field_violations(0).description(), "too odd");
  EXPECT_TRUE(field_errors(absl::InvalidArgumentError("No field here: none")).empty());

  Status position = absl::OutOfRangeError("beyond the end");
  position.SetPayload("longspan.expected_pos", absl::Cord("42"));
  const auto infos = details_of<google::rpc::ErrorInfo>(to_rpc_status(position));
  ASSERT_EQ(infos.size(), 1U);
  EXPECT_EQ(infos[0].metadata().at("expected_pos"), "42");
}

TEST(ErrorDetails, WhatPassesBringsAHintToRetry) {
  EXPECT_EQ(details_of<google::rpc::RetryInfo>(to_rpc_status(absl::UnavailableError("x"))).size(),
            1U);
  EXPECT_EQ(
      details_of<google::rpc::RetryInfo>(to_rpc_status(absl::ResourceExhaustedError("x"))).size(),
      1U);
  const Status quota = with_reason(absl::ResourceExhaustedError("x"), "QUOTA");
  EXPECT_TRUE(details_of<google::rpc::RetryInfo>(to_rpc_status(quota)).empty());
}

TEST(ErrorDetails, SurvivesTheWayThere) {
  const Status sent = with_retry(
      with_quota(with_reason(absl::ResourceExhaustedError("full"), "QUOTA", {{"key", "value"}}),
                 "contexts/a",
                 "too much"),
      std::chrono::milliseconds(1250));
  const Status received = from_grpc_status(to_grpc_status(sent));
  EXPECT_EQ(received.code(), sent.code());
  EXPECT_EQ(received.message(), sent.message());
  EXPECT_EQ(reason_of(received), "QUOTA");
  const auto message = to_rpc_status(received);
  const auto retries = details_of<google::rpc::RetryInfo>(message);
  ASSERT_EQ(retries.size(), 1U);
  EXPECT_EQ(retries[0].retry_delay().seconds(), 1);
  EXPECT_EQ(retries[0].retry_delay().nanos(), 250'000'000);
  EXPECT_EQ(details_of<google::rpc::QuotaFailure>(message)[0].violations(0).subject(),
            "contexts/a");
}

TEST(ErrorDetails, FitsTheHeadersHoweverMuchIsWrong) {
  std::vector<FieldError> violations;
  violations.reserve(10'000);
  for (int i = 0; i < 10'000; ++i) {
    violations.push_back({absl::StrCat("branches[", i, "]"), std::string(300, 'x')});
  }
  const Status status = invalid_argument(violations);
  EXPECT_EQ(field_errors(status).size(), violations.size()) << "in-band nothing is cut";
  EXPECT_THAT(std::string(status.message()), HasSubstr("9996 more"));
  const grpc::Status sent = to_grpc_status(status);
  EXPECT_LE(sent.error_details().size() * 4 / 3 + sent.error_message().size(), 6000U);
  EXPECT_EQ(reason_of(from_grpc_status(sent)), "INVALID_FIELD");
  const auto kept = field_errors(from_grpc_status(sent));
  ASSERT_FALSE(kept.empty());
  EXPECT_EQ(kept[0].field, "branches[0]");
}

TEST(ErrorDetails, AForeignStatusIsTakenAsItIs) {
  const Status plain = from_grpc_status(grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone"));
  EXPECT_TRUE(absl::IsUnavailable(plain));
  const Status garbled =
      from_grpc_status(grpc::Status(grpc::StatusCode::ABORTED, "why", "\xff\xff no proto"));
  EXPECT_TRUE(absl::IsAborted(garbled));
  EXPECT_EQ(garbled.message(), "why");
}

}  // namespace
}  // namespace longspan
