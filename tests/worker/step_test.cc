// Step descriptors survive the host channel, and damaged ones are refused.
#include "worker/step.h"

#include <gtest/gtest.h>

#include "tests/support/cases.h"
#include "tests/support/methods.h"

namespace longspan::testing {
namespace {

Step make_step() {
  Step step;
  step.kind = StepKind::kAttend;
  for (const Method& method : all_methods()) {
    Task& task = step.tasks.emplace_back();
    task.context = 77;
    task.layer = 3;
    task.start_pos = int64_t{1} << 33;
    task.num_rows = 9;
    task.has_tokens = true;
    task.show = true;
    task.phase = Phase::kPrefill;
    task.method_index = -1;
    task.method = method;
    task.method.dense_layers = {0, 5};
    task.method.branches[0].summary.key_weights = {0.5F, 0.25F};
    task.return_selection = true;
  }
  step.tasks.emplace_back().method_index = 2;
  return step;
}

TEST(Step, TasksSurvive) {
  const Step step = make_step();
  std::vector<std::byte> bytes;
  serialize(step, bytes);
  const auto parsed = parse_step(bytes);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  ASSERT_EQ(parsed->tasks.size(), step.tasks.size());
  for (size_t i = 0; i < step.tasks.size(); ++i) {
    const Task& a = step.tasks[i];
    const Task& b = parsed->tasks[i];
    EXPECT_EQ(b.context, a.context);
    EXPECT_EQ(b.layer, a.layer);
    EXPECT_EQ(b.start_pos, a.start_pos);
    EXPECT_EQ(b.num_rows, a.num_rows);
    EXPECT_EQ(b.has_tokens, a.has_tokens);
    EXPECT_EQ(b.show, a.show);
    EXPECT_EQ(b.phase, a.phase);
    EXPECT_EQ(b.method_index, a.method_index);
    EXPECT_EQ(b.method, a.method) << a.method.name;
    EXPECT_EQ(b.return_selection, a.return_selection);
    EXPECT_EQ(b.compare_with_dense, a.compare_with_dense);
  }
}

TEST(Step, AShapeSurvives) {
  Step step;
  step.kind = StepKind::kCreate;
  step.context = 5;
  step.shape.num_layers = 30;
  step.shape.num_query_heads = 9;
  step.shape.num_kv_heads = 3;
  step.shape.key_dim = 64;
  step.shape.value_dim = 80;
  step.shape.kv_dtype = DataType::kFloat16;
  step.shape.scale = 0.5F;
  step.shape.soft_cap = 30.0F;
  step.shape.sink_logits = {1.0F, 2.0F};
  step.shape.methods = all_methods();
  step.shape.layout = {LayoutKind::kZigzag, 4, 128};
  step.shape.max_tokens = 1000;
  std::vector<std::byte> bytes;
  serialize(step, bytes);
  const auto parsed = parse_step(bytes);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const ContextShape& shape = parsed->shape;
  EXPECT_EQ(parsed->context, 5U);
  EXPECT_EQ(shape.num_layers, 30);
  EXPECT_EQ(shape.num_query_heads, 9);
  EXPECT_EQ(shape.num_kv_heads, 3);
  EXPECT_EQ(shape.key_dim, 64);
  EXPECT_EQ(shape.value_dim, 80);
  EXPECT_EQ(shape.kv_dtype, DataType::kFloat16);
  EXPECT_EQ(shape.scale, 0.5F);
  EXPECT_EQ(shape.soft_cap, 30.0F);
  EXPECT_EQ(shape.sink_logits, step.shape.sink_logits);
  EXPECT_EQ(shape.methods, step.shape.methods);
  EXPECT_EQ(shape.layout.kind, LayoutKind::kZigzag);
  EXPECT_EQ(shape.layout.num_ranks, 4);
  EXPECT_EQ(shape.layout.stripe_tokens, 128);
  EXPECT_EQ(shape.max_tokens, 1000);
}

TEST(Step, DamagedBytesAreRefused) {
  std::vector<std::byte> bytes;
  serialize(make_step(), bytes);
  for (size_t size = 0; size < bytes.size(); size += 13) {
    EXPECT_EQ(parse_step(std::span(bytes).first(size)).status().code(),
              absl::StatusCode::kDataLoss);
  }
  bytes.push_back(std::byte{0});
  EXPECT_EQ(parse_step(bytes).status().code(), absl::StatusCode::kDataLoss);
}

TEST(Step, GarbageDoesNotCrash) {
  Random random(21);
  std::vector<std::byte> bytes;
  serialize(make_step(), bytes);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::byte> garbage = bytes;
    for (int i = 0; i < 4; ++i) {
      garbage[static_cast<size_t>(random.between(0, std::ssize(garbage) - 1))] =
          static_cast<std::byte>(random.between(0, 255));
    }
    (void)parse_step(garbage);
  }
}

}  // namespace
}  // namespace longspan::testing
