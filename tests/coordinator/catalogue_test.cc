// The catalogue as a state machine, with a clock of the test's own.
#include "coordinator/catalogue.h"

#include <string>

#include "absl/strings/str_cat.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error_details.h"

namespace longspan {
namespace {

using std::chrono::seconds;
using testing::ElementsAre;
using testing::IsEmpty;

class CatalogueTest : public testing::Test {
 protected:
  static v1::ContextSpec spec_with_layers(uint32_t layers) {
    v1::ContextSpec spec;
    spec.set_num_layers(layers);
    return spec;
  }

  StatusOr<Catalogue::Reservation> reserve(const std::string& id,
                                           const v1::ContextSpec& spec,
                                           const std::string& request_id = "") {
    record_ = ContextRecord();
    record_.context_id = id;
    record_.asked = spec;
    record_.request_id = request_id;
    return catalogue_.reserve(record_, now_);
  }

  void add(const std::string& id, const v1::ContextSpec& spec) {
    ASSERT_EQ(*reserve(id, spec), Catalogue::Reservation::kReserved);
    catalogue_.confirm(record_.context_id, spec);
  }

  v1::ContextSpec leased(int64_t ttl_seconds) const {
    v1::ContextSpec spec = spec_with_layers(1);
    spec.mutable_ttl()->set_seconds(ttl_seconds);
    return spec;
  }

  Catalogue catalogue_{3};
  Moment now_{SteadyTime(seconds(1000)), SystemTime(seconds(1'700'000'000))};
  ContextRecord record_;
};

TEST_F(CatalogueTest, AnEqualSpecIsTheSameContext) {
  add("a", spec_with_layers(2));
  EXPECT_EQ(*reserve("a", spec_with_layers(2)), Catalogue::Reservation::kExists);
  EXPECT_TRUE(absl::IsAlreadyExists(reserve("a", spec_with_layers(3)).status()));
  EXPECT_EQ(catalogue_.num_contexts(), 1U);
}

TEST_F(CatalogueTest, TheSpecAsTheWorkerTookItIsTheSameContextToo) {
  ASSERT_TRUE(reserve("a", spec_with_layers(2)).ok());
  v1::ContextSpec effective = spec_with_layers(2);
  effective.set_max_tokens(77);
  catalogue_.confirm("a", effective);
  EXPECT_EQ(*reserve("a", effective), Catalogue::Reservation::kExists);
  EXPECT_EQ((*catalogue_.find("a"))->spec.max_tokens(), 77U);
}

TEST_F(CatalogueTest, WhatIsPendingIsNotSeenAndMayBeAskedForLater) {
  ASSERT_TRUE(reserve("a", spec_with_layers(1)).ok());
  EXPECT_TRUE(absl::IsUnavailable(reserve("a", spec_with_layers(1)).status()));
  EXPECT_TRUE(absl::IsNotFound(catalogue_.find("a").status()));
  EXPECT_THAT(catalogue_.list("", 10), IsEmpty());
  EXPECT_TRUE(absl::IsUnavailable(catalogue_.begin_removal("a")));
  catalogue_.drop("a");
  EXPECT_EQ(*reserve("a", spec_with_layers(5)), Catalogue::Reservation::kReserved);
}

TEST_F(CatalogueTest, ARequestIdIsRememberedForAsLongAsItsContext) {
  ASSERT_TRUE(reserve("", spec_with_layers(1), "r1").ok());
  const std::string id = record_.context_id;
  ASSERT_FALSE(id.empty());
  catalogue_.confirm(id, spec_with_layers(1));
  EXPECT_EQ(*reserve("", spec_with_layers(1), "r1"), Catalogue::Reservation::kExists);
  EXPECT_EQ(record_.context_id, id);
  EXPECT_TRUE(absl::IsAlreadyExists(reserve("", spec_with_layers(2), "r1").status()));
  catalogue_.drop(id);
  EXPECT_EQ(*reserve("", spec_with_layers(2), "r1"), Catalogue::Reservation::kReserved);
  EXPECT_NE(record_.context_id, id);
}

TEST_F(CatalogueTest, AForkIsNotAnOrdinaryContext) {
  ContextRecord fork;
  fork.context_id = "child";
  fork.parent_id = "parent";
  fork.forked_tokens = 10;
  ASSERT_TRUE(catalogue_.reserve(fork, now_).ok());
  catalogue_.confirm("child", v1::ContextSpec());
  EXPECT_EQ(*catalogue_.reserve(fork, now_), Catalogue::Reservation::kExists);
  fork.forked_tokens = 11;
  EXPECT_TRUE(absl::IsAlreadyExists(catalogue_.reserve(fork, now_).status()));
  EXPECT_TRUE(absl::IsAlreadyExists(reserve("child", v1::ContextSpec()).status()));
}

TEST_F(CatalogueTest, IdsAreChecked) {
  for (const std::string& id : {std::string("a b"), std::string(129, 'a'), std::string("\0", 1)}) {
    EXPECT_TRUE(absl::IsInvalidArgument(reserve(id, spec_with_layers(1)).status()));
  }
  EXPECT_TRUE(
      absl::IsInvalidArgument(reserve("a", spec_with_layers(1), std::string(200, 'r')).status()));
  EXPECT_TRUE(reserve(std::string(128, 'a'), spec_with_layers(1)).ok());
}

TEST_F(CatalogueTest, IsBounded) {
  for (const char* id : {"a", "b", "c"}) {
    add(id, spec_with_layers(1));
  }
  const Status full = reserve("d", spec_with_layers(1)).status();
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_EQ(reason_of(full), "CAPACITY");
  EXPECT_EQ(*reserve("a", spec_with_layers(1)), Catalogue::Reservation::kExists);
}

TEST_F(CatalogueTest, ListsByIdAfterAnId) {
  for (const char* id : {"c", "a", "b"}) {
    add(id, spec_with_layers(1));
  }
  const auto ids = [](const std::vector<const ContextRecord*>& records) {
    std::vector<std::string> found;
    found.reserve(records.size());
    for (const ContextRecord* record : records) {
      found.push_back(record->context_id);
    }
    return found;
  };
  EXPECT_THAT(ids(catalogue_.list("", 10)), ElementsAre("a", "b", "c"));
  EXPECT_THAT(ids(catalogue_.list("a", 1)), ElementsAre("b"));
  EXPECT_THAT(ids(catalogue_.list("bb", 10)), ElementsAre("c"));
  ASSERT_TRUE(catalogue_.begin_removal("b").ok());
  EXPECT_THAT(ids(catalogue_.list("", 10)), ElementsAre("a", "c"));
  catalogue_.cancel_removal("b");
  EXPECT_THAT(ids(catalogue_.list("", 10)), ElementsAre("a", "b", "c"));
}

TEST_F(CatalogueTest, LeasesRunOutUnlessTheyAreRenewed) {
  add("forever", spec_with_layers(1));
  add("short", leased(10));
  add("long", leased(100));
  const SteadyTime start = now_.steady;
  EXPECT_THAT(catalogue_.overdue(start + seconds(9)), IsEmpty());
  EXPECT_THAT(catalogue_.overdue(start + seconds(10)), ElementsAre("short"));
  ASSERT_TRUE(catalogue_.renew("short", start + seconds(10)).ok());
  EXPECT_THAT(catalogue_.overdue(start + seconds(19)), IsEmpty());
  EXPECT_THAT(catalogue_.overdue(start + seconds(100)), ElementsAre("long", "short"));
  EXPECT_TRUE(absl::IsNotFound(catalogue_.renew("nosuch", start)));
}

}  // namespace
}  // namespace longspan
