// Attend: every target against the reference, over shapes, types, lengths, selections and numbers
// that are not finite.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/backend.h"
#include "tests/kernels/conformance.h"

namespace longspan::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Spans of every row and selection head, in the layout of AttendParams.
struct SpanLists {
  int num_heads = 1;  // S
  std::vector<int64_t> offsets{0};
  std::vector<Span> spans;

  void add(Span span) {
    if (span.begin < span.end) {
      spans.push_back(span);
    }
  }
  void close() { offsets.push_back(static_cast<int64_t>(spans.size())); }
};

SpanLists causal_lists(const Case& test_case) {
  SpanLists lists;
  for (int64_t row = 0; row < test_case.num_rows; ++row) {
    lists.add({0, test_case.first_position() + row + 1});
    lists.close();
  }
  return lists;
}

// Disjoint spans with any boundaries inside what each row sees; some lists are empty.
SpanLists random_lists(const Case& test_case, int num_heads, Random& random) {
  SpanLists lists;
  lists.num_heads = num_heads;
  for (int64_t row = 0; row < test_case.num_rows; ++row) {
    const int64_t visible = test_case.first_position() + row + 1;
    for (int head = 0; head < num_heads; ++head) {
      int64_t token = random.chance(0.1) ? visible : random.between(0, visible / 2);
      while (token < visible) {
        const int64_t end = std::min(visible, token + random.between(1, 150));
        lists.add({token, end});
        token = end + random.between(0, 300);
      }
      lists.close();
    }
  }
  return lists;
}

struct AttendSetup {
  std::vector<float> query;
  PagedTensor kv;
  SpanLists lists;
  std::vector<int64_t> row_query;  // empty: each row its own
  bool wants_out = true;
};

AttendSetup make_setup(const Case& test_case, SpanLists lists, Random& random) {
  CaseTensors tensors = make_tensors(test_case, random);
  return {std::move(tensors.query),
          PagedTensor(test_case.dtype,
                      test_case.num_kv_heads,
                      test_case.key_dim,
                      test_case.value_dim,
                      tensors.keys,
                      tensors.values),
          std::move(lists),
          {},
          true};
}

struct AttendOutput {
  std::vector<float> out;
  std::vector<float> lse;
};

AttendOutput attend_with(Backend& backend, const Case& test_case, const AttendSetup& setup) {
  const auto rows = static_cast<size_t>(setup.lists.offsets.size() - 1) /
                    static_cast<size_t>(setup.lists.num_heads);
  const size_t lanes = rows * static_cast<size_t>(test_case.num_query_heads);
  AttendOutput result{poisoned(lanes * static_cast<size_t>(test_case.value_dim)), poisoned(lanes)};
  AttendParams params;
  params.query = setup.query.data();
  params.row_query = setup.row_query.empty() ? nullptr : setup.row_query.data();
  params.num_rows = static_cast<int64_t>(rows);
  params.num_query_heads = test_case.num_query_heads;
  params.kv = setup.kv.view();
  params.num_selection_heads = setup.lists.num_heads;
  params.span_offsets = setup.lists.offsets.data();
  params.spans = setup.lists.spans.data();
  params.scale = test_case.attention_scale();
  params.soft_cap = test_case.soft_cap;
  params.out = setup.wants_out ? result.out.data() : nullptr;
  params.lse = result.lse.data();
  Stream stream;
  EXPECT_TRUE(backend.attend(params, stream).ok());
  return result;
}

void expect_attend_matches(Backend& backend,
                           Backend& reference,
                           const Case& test_case,
                           const AttendSetup& setup) {
  const AttendOutput actual = attend_with(backend, test_case, setup);
  const AttendOutput expected = attend_with(reference, test_case, setup);
  const Tolerance limits = tolerance(test_case.dtype);
  if (setup.wants_out) {
    EXPECT_TRUE(
        outputs_match(actual.out, expected.out, static_cast<size_t>(test_case.value_dim), limits))
        << test_case;
  }
  EXPECT_TRUE(lse_match(actual.lse, expected.lse, limits)) << test_case;
}

constexpr DataType kDtypes[] = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16};

class AttendConformance : public Conformance {
 protected:
  void check(const Case& test_case, SpanLists lists, int num_threads, Random& random) const {
    AttendSetup setup = make_setup(test_case, std::move(lists), random);
    expect_attend_matches(*backend(num_threads), *reference(), test_case, setup);
    // Queries that are numbers of the cache's type have kernels of their own.
    round_to(test_case.dtype, setup.query);
    expect_attend_matches(*backend(num_threads), *reference(), test_case, setup);
  }
};

TEST_P(AttendConformance, HeadSizesAndTypes) {
  Random numbers = random(1);
  const int dims[][2] = {{64, 64},
                         {80, 80},
                         {96, 96},
                         {128, 128},
                         {192, 128},
                         {256, 256},
                         {64, 192},
                         {8, 8},
                         {72, 40},
                         {24, 104}};
  for (const auto& [key_dim, value_dim] : dims) {
    for (const DataType dtype : kDtypes) {
      Case test_case{.name = "head size", .key_dim = key_dim, .value_dim = value_dim};
      test_case.dtype = dtype;
      test_case.num_tokens = 150;
      test_case.num_rows = 5;
      check(test_case, causal_lists(test_case), 1, numbers);
    }
  }
}

TEST_P(AttendConformance, GroupsOfQueryHeads) {
  Random numbers = random(2);
  const int heads[][2] = {
      {1, 1}, {3, 1}, {9, 3}, {8, 8}, {8, 2}, {16, 2}, {16, 1}, {15, 3}, {7, 1}, {130, 1}};
  for (const auto& [num_query_heads, num_kv_heads] : heads) {
    for (const int64_t num_rows : {1, 40}) {
      Case test_case{
          .name = "group", .num_query_heads = num_query_heads, .num_kv_heads = num_kv_heads};
      test_case.num_tokens = 200;
      test_case.num_rows = num_rows;
      check(test_case, causal_lists(test_case), 2, numbers);
    }
  }
}

TEST_P(AttendConformance, LengthsAroundPages) {
  Random numbers = random(3);
  for (const int64_t num_tokens : {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 193, 1000}) {
    for (const DataType dtype : kDtypes) {
      Case test_case{.name = "length", .num_query_heads = 6, .num_kv_heads = 2};
      test_case.dtype = dtype;
      test_case.num_tokens = num_tokens;
      test_case.num_rows = std::min<int64_t>(num_tokens, 70);
      check(test_case, causal_lists(test_case), 2, numbers);
    }
  }
}

TEST_P(AttendConformance, SelectionsPerRowPerKvHeadAndPerQueryHead) {
  Random numbers = random(4);
  for (int round = 0; round < 6; ++round) {
    for (const int num_heads : {1, 3, 9}) {
      Case test_case{.name = "selection", .num_query_heads = 9, .num_kv_heads = 3};
      test_case.dtype = kDtypes[round % 3];
      test_case.num_tokens = numbers.between(1, 3000);
      test_case.num_rows = std::min(test_case.num_tokens, numbers.between(1, 60));
      check(test_case, random_lists(test_case, num_heads, numbers), 2, numbers);
    }
  }
}

TEST_P(AttendConformance, LongDecodeIsDealtToThreads) {
  Random numbers = random(5);
  for (const int num_threads : {1, 2, 5}) {
    Case test_case{.name = "long", .num_query_heads = 4, .num_kv_heads = 2};
    test_case.dtype = kDtypes[num_threads % 3];
    test_case.num_tokens = 10007;
    check(test_case, causal_lists(test_case), num_threads, numbers);
    check(test_case, random_lists(test_case, 4, numbers), num_threads, numbers);
  }
}

TEST_P(AttendConformance, SoftCapAndLargeLogits) {
  Random numbers = random(6);
  for (const float soft_cap : {0.0F, 0.5F, 30.0F}) {
    for (const float scale : {1.0F, 0.02F}) {
      for (const DataType dtype : kDtypes) {
        Case test_case{.name = "soft cap", .soft_cap = soft_cap};
        test_case.dtype = dtype;
        test_case.scale = scale;
        test_case.num_tokens = 300;
        test_case.num_rows = 3;
        check(test_case, causal_lists(test_case), 1, numbers);
      }
    }
  }
}

TEST_P(AttendConformance, RowsShareQueriesAndOutputsAreOptional) {
  Random numbers = random(8);
  Case test_case{.name = "row query"};
  test_case.num_tokens = 500;
  test_case.num_rows = 4;
  AttendSetup setup = make_setup(test_case, random_lists(test_case, 1, numbers), numbers);
  setup.row_query = {3, 3, 0, 2};
  expect_attend_matches(*backend(1), *reference(), test_case, setup);
  setup.wants_out = false;
  expect_attend_matches(*backend(1), *reference(), test_case, setup);
  test_case.num_tokens = 20000;
  setup = make_setup(test_case, causal_lists(test_case), numbers);
  setup.wants_out = false;
  expect_attend_matches(*backend(4), *reference(), test_case, setup);
}

TEST_P(AttendConformance, NoRowsAndRowsWithoutTokens) {
  Case test_case{.name = "empty"};
  test_case.num_tokens = 1;
  Random numbers = random(9);
  AttendSetup setup = make_setup(test_case, SpanLists{}, numbers);
  EXPECT_TRUE(attend_with(*backend(2), test_case, setup).out.empty());
  setup.lists.close();
  const AttendOutput empty = attend_with(*backend(2), test_case, setup);
  EXPECT_EQ(empty.lse, std::vector<float>(4, -kInfinity));
  EXPECT_EQ(empty.out, std::vector<float>(size_t{4} * 64, 0.0F));
}

// A token that a row does not see must not change it, whatever the token holds.
TEST_P(AttendConformance, NumbersThatAreNotFiniteStayWithTheRowsThatSeeThem) {
  Random numbers = random(10);
  for (const DataType dtype : kDtypes) {
    for (const float poison : {kNan, kInfinity, -kInfinity}) {
      for (const bool in_keys : {true, false}) {
        Case test_case{.name = "poison", .num_query_heads = 6, .num_kv_heads = 2};
        test_case.dtype = dtype;
        test_case.num_tokens = 130;
        test_case.num_rows = 100;
        AttendSetup setup = make_setup(test_case, causal_lists(test_case), numbers);
        for (const int64_t token : {64, 90}) {
          if (in_keys) {
            setup.kv.set_key(token, 1, 3, poison);
          } else {
            setup.kv.set_value(token, 1, 3, poison);
          }
        }
        expect_attend_matches(*backend(2), *reference(), test_case, setup);
        round_to(dtype, setup.query);
        expect_attend_matches(*backend(2), *reference(), test_case, setup);
      }
    }
  }
}

TEST_P(AttendConformance, KeysThatPushEveryLogitToMinusInfinityLeaveTheRowEmpty) {
  Random numbers = random(11);
  Case test_case{.name = "all minus infinity", .num_query_heads = 1, .num_kv_heads = 1};
  test_case.dtype = DataType::kFloat32;
  test_case.num_tokens = 70;
  AttendSetup setup = make_setup(test_case, causal_lists(test_case), numbers);
  setup.query[0] = 1.0F;
  for (int64_t token = 0; token < test_case.num_tokens; ++token) {
    setup.kv.set_key(token, 0, 0, -kInfinity);
  }
  expect_attend_matches(*backend(1), *reference(), test_case, setup);
}

INSTANTIATE_TEST_SUITE_P(Targets, AttendConformance, kAllTargets, target_name);

}  // namespace
}  // namespace longspan::testing
