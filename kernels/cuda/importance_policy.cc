#include "kernels/cuda/importance_policy.h"

#include <algorithm>

#include "base/checked.h"

namespace longspan::cuda {
namespace {

constexpr int64_t kMaxIndex = int64_t{1} << 30;  // windows and rows are 32-bit numbers
constexpr int64_t kMaxBlocks = 65535;            // in the second dimension of a grid
constexpr int64_t kPlacesPerRegister = 32;
constexpr int kMaxRegisters = 4;
constexpr int kMaxGroup = 16;
constexpr size_t kStaticBytes = 1024;  // shared memory that the kernel has besides
constexpr int kMaxWarpgroups = 4;
// Below this a share of the windows is not worth a block of its own.
constexpr int64_t kMinShareStages = 4;

bool is_power_of_two(int64_t number) { return number > 0 && (number & (number - 1)) == 0; }

const char* why_not(const ImportanceShape& shape, const DeviceInfo& device) {
  if (!device.is_hopper()) {
    return "not Hopper";
  }
  if (shape.dtype == DataType::kFloat32) {
    return "summaries of fp32";
  }
  if (shape.dim != 64 && shape.dim != 128) {
    return "neither 64 nor 128 channels";
  }
  if (shape.group() > kMaxGroup) {
    return "more than 16 query heads of a KV head";
  }
  if (shape.dtype == DataType::kFloat16 && shape.query_dtype != DataType::kFloat16) {
    return "queries that are no fp16, which is too narrow for their parts";
  }
  if (shape.stride_tokens <= 0 || shape.window_tokens % shape.stride_tokens != 0 ||
      shape.block_tokens % shape.stride_tokens != 0) {
    return "strides do not divide windows and blocks";
  }
  if (!is_power_of_two(shape.windows_per_block()) ||
      shape.windows_per_block() > kImportanceWindows ||
      shape.windows_before() > kImportanceWindows) {
    return "windows of a block are no power of two up to 64";
  }
  if (shape.max_k > kPlacesPerRegister * kMaxRegisters) {
    return "lists of more than 128 blocks";
  }
  return shape.num_rows > kMaxIndex || shape.num_windows > kMaxIndex ? "too many rows" : nullptr;
}

int64_t shared_bytes(const ImportanceShape& shape, const ImportancePlan& plan) {
  const int64_t queries = int64_t{plan.warpgroups} * plan.num_terms * kImportanceColumns;
  const int64_t windows = int64_t{kImportanceStages} * kImportanceWindows;
  const int64_t places = kPlacesPerRegister * plan.list_registers + kImportanceBuffer;
  return (queries + windows) * shape.dim * 2 +
         plan.tokens_per_block *
             (places * int64_t{sizeof(uint64_t)} + kImportanceRingStride * int64_t{sizeof(float)} +
              kImportanceRowBytes);
}

}  // namespace

ImportancePlan plan_importance(const ImportanceShape& shape, const DeviceInfo& device) {
  ImportancePlan plan;
  plan.declined = why_not(shape, device);
  if (plan.declined != nullptr) {
    return plan;
  }
  plan.num_terms = shape.query_dtype == shape.dtype ? 1 : 3;
  plan.columns_per_token = importance_columns_per_token(shape.group());
  plan.list_registers = shape.max_k <= kPlacesPerRegister ? 1 : kMaxRegisters;
  const int tokens_per_warpgroup = kImportanceColumns / plan.columns_per_token;
  const int64_t useful = divide_up(std::max<int64_t>(1, shape.num_rows), tokens_per_warpgroup);
  for (plan.warpgroups = kMaxWarpgroups; plan.warpgroups > 0; plan.warpgroups /= 2) {
    plan.tokens_per_block = int64_t{plan.warpgroups} * tokens_per_warpgroup;
    const int64_t bytes = shared_bytes(shape, plan);
    plan.shared_bytes = static_cast<size_t>(bytes);
    if (plan.shared_bytes + kStaticBytes <= device.shared_memory_per_block &&
        plan.warpgroups < 2 * useful) {
      break;
    }
  }
  if (plan.warpgroups == 0) {
    plan.declined = "too much shared memory";
    return plan;
  }
  plan.num_groups = divide_up(shape.num_rows, plan.tokens_per_block) * shape.num_kv_heads;
  // Small blocks share an SM.
  const int64_t wanted = device.num_sms * (kMaxWarpgroups / plan.warpgroups >= 2 ? 2 : 1);
  const int64_t stages = divide_up(shape.num_windows, kImportanceWindows);
  plan.num_splits = static_cast<int>(
      std::clamp<int64_t>(wanted / std::max<int64_t>(1, plan.num_groups),
                          1,
                          std::max<int64_t>(1, divide_up(stages, kMinShareStages))));
  if (plan.num_splits > 1) {
    plan.workspace_bytes =
        sizeof(uint64_t) *
        static_cast<size_t>(plan.num_groups * plan.num_splits * plan.tokens_per_block *
                            kPlacesPerRegister * plan.list_registers);
    plan.num_tickets = plan.num_groups;
  }
  if (plan.num_splits > kMaxBlocks || plan.num_groups >= int64_t{1} << 31) {
    plan.declined = "too many blocks";
  }
  return plan;
}

}  // namespace longspan::cuda
