// The heart of the suite: for every method, layout, cache type, backend and rank count, what the
// group answers is what the reference pipeline answers over plain arrays, through a life of
// appends, prefill, decoding, forks, truncation and replays.
#include <memory>

#include "absl/strings/str_cat.h"
#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "tests/support/methods.h"
#include "tests/worker/context_model.h"

namespace longspan::testing {
namespace {

struct Setting {
  std::string backend;
  int num_ranks = 1;
  DataType dtype = DataType::kBFloat16;
};

const char* name_of(LayoutKind kind) {
  switch (kind) {
    case LayoutKind::kBlockCyclic:
      return "block_cyclic";
    case LayoutKind::kContiguous:
      return "contiguous";
    case LayoutKind::kZigzag:
      return "zigzag";
  }
  return "?";
}

// What the published methods leave untried: budgets by ratio, blocks larger than a page, one choice
// for all heads, weighted windows with a long overlap, and roles.
std::vector<Method> unusual_methods() {
  Method ratio = a_shape_method(32, 1, 1);
  ratio.name = "ratio_for_all_heads";
  Branch& branch = ratio.branches[0];
  branch.search.head_reduce = HeadReduce::kAllMean;
  branch.summary.scale_by_sqrt_length = true;
  branch.budget.prefill = {Amount::Kind::kRatio, 0.4, 2, 9};
  branch.budget.decode = {Amount::Kind::kTokens, 100, 0, 0};

  Method large = quest_method(128, 2);
  large.name = "large_blocks";
  large.branches[0].search.head_reduce = HeadReduce::kGroupSum;
  large.branches[0].selection.forced_within_budget = false;
  large.dense_layers = {1};
  large.dense_below_tokens = 40;

  Method overlap = nsa_method(64, 8, 64, 5, 30);
  overlap.name = "long_overlap";
  for (Branch& part : overlap.branches) {
    for (int i = 0; i < part.summary.window_tokens; ++i) {
      part.summary.key_weights.push_back(0.01F * static_cast<float>(i % 5));
      part.summary.value_weights.push_back(0.02F);
    }
  }
  overlap.dense_prefill = true;
  return {std::move(ratio), std::move(large), std::move(overlap)};
}

std::vector<Method> tried_methods() {
  std::vector<Method> methods = all_methods();
  for (Method& method : unusual_methods()) {
    methods.push_back(std::move(method));
  }
  return methods;
}

std::unique_ptr<Group> make_group(const Setting& setting) {
  GroupOptions options;
  options.num_ranks = setting.num_ranks;
  options.backend = setting.backend;
  options.kv_capacity_bytes = int64_t{1} << 30;
  auto group = Group::start_in_process(options);
  EXPECT_TRUE(group.ok()) << group.status();
  return *std::move(group);
}

ContextShape make_shape(const Setting& setting,
                        const Method& method,
                        LayoutKind kind,
                        Random& random) {
  constexpr int64_t kMaxTokens = 700;
  ContextShape shape;
  shape.num_layers = 2;
  shape.num_query_heads = 4;
  shape.num_kv_heads = 2;
  shape.key_dim = 64;
  shape.value_dim = random.chance(0.5) ? 64 : 80;
  shape.kv_dtype = setting.dtype;
  shape.scale = 0.125F;
  shape.soft_cap = random.chance(0.3) ? 5.0F : 0.0F;
  if (random.chance(0.3)) {
    shape.sink_logits = random.normals(4);
  }
  shape.methods = {method};
  shape.max_tokens = kMaxTokens;
  const int64_t alignment = method.alignment_tokens();
  const int64_t stripe = kind == LayoutKind::kBlockCyclic ? alignment * random.between(1, 2) : 0;
  shape.layout = *Layout::make(kind, setting.num_ranks, stripe, kMaxTokens, alignment);
  return shape;
}

// A length near a multiple of a page or of a block.
int64_t tricky_length(Random& random, int64_t low, int64_t high) {
  const int64_t unit = random.chance(0.5) ? 64 : random.between(1, 3) * 16;
  const int64_t near = random.between(low / unit, high / unit) * unit + random.between(-2, 2);
  return std::clamp<int64_t>(near, low, high);
}

void decode(ContextModel& model, const Method& method, int steps, Tally& tally) {
  for (int step = 0; step < steps; ++step) {
    for (int layer = 0; layer < 2; ++layer) {
      model.ask({layer, Phase::kDecode, model.length(layer), 1, true}, method, tally);
    }
  }
}

void prefill(ContextModel& model, const Method& method, int64_t rows, Tally& tally) {
  for (int layer = 0; layer < 2; ++layer) {
    model.ask({layer, Phase::kPrefill, model.length(layer), rows, true}, method, tally);
  }
}

void live(Group& group, const ContextShape& shape, Random& random, Tally& tally) {
  const Method& method = shape.methods[0];
  ASSERT_TRUE(group.create(1, shape).ok());
  ContextModel parent(group, 1, shape, random);
  // From nothing: one token, then more.
  prefill(parent, method, random.between(1, 20), tally);
  parent.append(tricky_length(random, 1, 450));
  prefill(parent, method, random.between(1, 24), tally);
  decode(parent, method, 2, tally);

  // A fork shares pages until either writes; both go on in one step.
  const int64_t shared =
      std::max<int64_t>(1, random.between(parent.length(0) / 2, parent.length(0)));
  ContextModel child = parent.fork(2, shared);
  decode(child, method, 2, tally);
  ContextModel::ask_together(group,
                             {{&parent, {0, Phase::kDecode, parent.length(0), 1, true}, &method},
                              {&child, {0, Phase::kDecode, child.length(0), 2, true}, &method},
                              {&child, {1, Phase::kPrefill, child.length(1), 3, true}, &method}},
                             tally);
  child.append(random.between(1, 90));
  // Without tokens: rows inside what is there.
  child.ask({1, Phase::kDecode, random.between(0, child.length(1) - 1), 1, false}, method, tally);

  // Truncation, other tokens in the same places, and rows that are there already.
  parent.ask({1, Phase::kPrefill, parent.length(1) - 1, 3, true}, method, tally);
  parent.truncate(random.between(0, std::min(parent.length(0), parent.length(1))));
  prefill(parent, method, random.between(1, 12), tally);
  decode(parent, method, 1, tally);
  ASSERT_TRUE(group.remove(1).ok());
  decode(child, method, 1, tally);
  ASSERT_TRUE(group.remove(2).ok());
  for (const int64_t bytes : group.usage().rank_bytes) {
    EXPECT_EQ(bytes, 0);
  }
}

class Sharded : public ::testing::TestWithParam<Setting> {};

TEST_P(Sharded, AnswersAsTheReference) {
  const Setting& setting = GetParam();
  const std::unique_ptr<Group> group = make_group(setting);
  Random random(static_cast<uint64_t>(setting.num_ranks) * 31 +
                static_cast<uint64_t>(setting.dtype));
  Tally tally;
  for (const LayoutKind kind :
       {LayoutKind::kBlockCyclic, LayoutKind::kContiguous, LayoutKind::kZigzag}) {
    for (const Method& method : tried_methods()) {
      const ContextShape shape = make_shape(setting, method, kind, random);
      SCOPED_TRACE(
          absl::StrCat(method.name, ", ", name_of(kind), ", stripe ", shape.layout.stripe_tokens));
      live(*group, shape, random, tally);
      if (HasFailure()) {
        return;
      }
    }
  }
  EXPECT_LT(tally.left_out * 50, tally.rows) << tally.left_out << " of " << tally.rows;
}

std::vector<Setting> settings() {
#if defined(LONGSPAN_TSAN) || defined(__SANITIZE_ADDRESS__)
  // Ten times slower: one of each kind of rank count, type and backend.
  return {{"simd", 1, DataType::kFloat32},
          {"simd", 4, DataType::kBFloat16},
          {"reference", 3, DataType::kFloat16}};
#else
  std::vector<Setting> all;
  for (const std::string& backend : backend_names()) {
    if ((*make_backend(backend, {}))->memory() != BackendMemory::kHost) {
      continue;  // a rank's pages are in host memory
    }
    for (const int ranks : {1, 2, 3, 4, 8}) {
      for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        all.push_back({backend, ranks, dtype});
      }
    }
  }
  return all;
#endif
}

std::string name_of_setting(const ::testing::TestParamInfo<Setting>& setting) {
  return absl::StrCat(setting.param.backend,
                      "_",
                      setting.param.num_ranks,
                      "_",
                      std::string(to_string(setting.param.dtype)));
}

INSTANTIATE_TEST_SUITE_P(All, Sharded, ::testing::ValuesIn(settings()), name_of_setting);

}  // namespace
}  // namespace longspan::testing
