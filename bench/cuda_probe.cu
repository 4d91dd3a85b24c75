// What the machine can do, measured before anything is designed for it: bytes a second from memory
// and from L2 into the multiprocessors, and what launches and barriers of the whole grid cost.
//
//   cuda_probe [--json FILE] [--quick]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <cooperative_groups.h>

#include "bench/cuda_support.h"
#include "kernels/cuda/ptx.h"

namespace longspan::cuda {
namespace {

constexpr int kRuns = 21;
constexpr uint32_t kBoxBytes = 16 << 10;  // the keys of a page at D = 128
constexpr int kStages = 4;
constexpr int kBoxesOfBlock = 2000;

__global__ void read_kernel(const uint4* source, int64_t count, uint32_t* sink) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint32_t sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const uint4 element = __ldcs(source + i);
    sum += element.x ^ element.y ^ element.z ^ element.w;
  }
  if (sum == 0x12345678) {
    *sink = sum;  // never, but the compiler cannot know
  }
}

// One thread keeps kStages copies of random boxes under way.
__global__ void box_kernel(const std::byte* source, uint32_t num_boxes, uint32_t* sink) {
  extern __shared__ __align__(1024) std::byte boxes[];
  __shared__ uint64_t barriers[kStages];
  if (threadIdx.x != 0) {
    return;
  }
  for (uint64_t& barrier : barriers) {
    ptx::barrier_init(ptx::shared_address(&barrier), 1);
  }
  ptx::barrier_init_fence();
  uint32_t state = 12345 + 7919 * blockIdx.x;
  for (int i = 0; i < kBoxesOfBlock + kStages; ++i) {
    const int stage = i % kStages;
    const uint32_t barrier = ptx::shared_address(&barriers[stage]);
    if (i >= kStages) {
      ptx::barrier_wait(barrier, static_cast<uint32_t>(i / kStages - 1) & 1);
    }
    if (i < kBoxesOfBlock) {
      state = state * 1664525 + 1013904223;
      const uint64_t box = state % num_boxes;
      ptx::barrier_arrive_expect(barrier, kBoxBytes);
      ptx::copy_bulk(ptx::shared_address(boxes) + stage * kBoxBytes,
                     source + box * kBoxBytes,
                     kBoxBytes,
                     barrier,
                     ptx::kEvictNormal);
    }
  }
  if (*reinterpret_cast<const volatile uint32_t*>(boxes) == 0x12345678) {
    *sink = 1;
  }
}

__global__ void empty_kernel() {}

__global__ void dependent_kernel() {
  ptx::launch_dependents();
  ptx::wait_for_dependencies();
}

__global__ void grid_barrier_kernel(int count) {
  for (int i = 0; i < count; ++i) {
    cooperative_groups::this_grid().sync();
  }
}

class Probe {
 public:
  explicit Probe(std::string json) : json_(std::move(json)) {
    check(cudaGetDeviceProperties(&properties_, 0), "cudaGetDeviceProperties");
    check(cudaStreamCreate(&stream_), "cudaStreamCreate");
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
    check(cudaMalloc(&sink_, sizeof(uint32_t)), "cudaMalloc");
    std::printf("%s, %d SMs, L2 %d MiB\n",
                properties_.name,
                properties_.multiProcessorCount,
                properties_.l2CacheSize >> 20);
  }

  void memory(int64_t num_bytes) {
    uint4* source = nullptr;
    check(cudaMalloc(&source, static_cast<size_t>(num_bytes)), "cudaMalloc");
    check(cudaMemset(source, 0x5a, static_cast<size_t>(num_bytes)), "cudaMemset");
    const double ms = median([&] {
      read_kernel<<<properties_.multiProcessorCount * 8, 512, 0, stream_>>>(
          source, num_bytes / 16, sink_);
    });
    report("read from memory", ms, static_cast<double>(num_bytes));
    check(cudaFree(source), "cudaFree");
  }

  // A source that L2 holds, or one that it does not.
  void boxes(int64_t num_bytes, int blocks_per_sm) {
    std::byte* source = nullptr;
    check(cudaMalloc(&source, static_cast<size_t>(num_bytes)), "cudaMalloc");
    check(cudaMemset(source, 0x5a, static_cast<size_t>(num_bytes)), "cudaMemset");
    check(cudaFuncSetAttribute(
              box_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStages * kBoxBytes),
          "cudaFuncSetAttribute");
    const int blocks = properties_.multiProcessorCount * blocks_per_sm;
    const double ms = median([&] {
      box_kernel<<<blocks, 32, kStages * kBoxBytes, stream_>>>(
          source, static_cast<uint32_t>(num_bytes / kBoxBytes), sink_);
    });
    char name[80];
    std::snprintf(name,
                  sizeof(name),
                  "boxes of 16 KiB from %d MiB, %d blocks a multiprocessor",
                  static_cast<int>(num_bytes >> 20),
                  blocks_per_sm);
    report(name, ms, static_cast<double>(blocks) * kBoxesOfBlock * kBoxBytes);
    check(cudaFree(source), "cudaFree");
  }

  // A kernel after the other in a graph, each waiting for the one before.
  void launches(bool programmatic) {
    constexpr int kCount = 200;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t instance = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < kCount; ++i) {
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(static_cast<unsigned>(properties_.multiProcessorCount));
      config.blockDim = dim3(128);
      config.stream = stream_;
      config.attrs = &attribute;
      config.numAttrs = programmatic ? 1 : 0;
      check(cudaLaunchKernelEx(&config, programmatic ? dependent_kernel : empty_kernel), "launch");
    }
    check(cudaStreamEndCapture(stream_, &graph), "capture");
    check(cudaGraphInstantiate(&instance, graph, 0), "cudaGraphInstantiate");
    const double ms = median([&] { check(cudaGraphLaunch(instance, stream_), "graph"); });
    report(
        programmatic ? "dependent kernel in a graph, programmatic" : "dependent kernel in a graph",
        ms / kCount,
        0);
    check(cudaGraphExecDestroy(instance), "cudaGraphExecDestroy");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }

  void grid_barrier() {
    int count = 1000;
    void* arguments[] = {&count};
    const double ms = median([&] {
      check(
          cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_barrier_kernel),
                                      dim3(static_cast<unsigned>(properties_.multiProcessorCount)),
                                      dim3(256),
                                      arguments,
                                      0,
                                      stream_),
          "cudaLaunchCooperativeKernel");
    });
    report("barrier of the whole grid", ms / count, 0);
  }

 private:
  double median(const std::function<void()>& work) {
    std::vector<float> times;
    for (int run = 0; run < kRuns + 3; ++run) {
      float ms = 0;
      check(cudaEventRecord(begin_, stream_), "cudaEventRecord");
      work();
      check(cudaEventRecord(end_, stream_), "cudaEventRecord");
      check(cudaEventSynchronize(end_), "cudaEventSynchronize");
      check(cudaGetLastError(), "launch");
      check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
      if (run >= 3) {
        times.push_back(ms);
      }
    }
    std::sort(times.begin(), times.end());
    low_ = times.front();
    high_ = times.back();
    return times[times.size() / 2];
  }

  void report(const char* name, double ms, double num_bytes) {
    std::printf("%-60s %10.4f ms", name, ms);
    if (num_bytes > 0) {
      std::printf("  %8.0f GB/s (%+.0f to %+.0f %%)",
                  num_bytes / ms / 1e6,
                  100 * (ms / high_ - 1),
                  100 * (ms / low_ - 1));
    }
    std::printf("\n");
    if (json_.empty()) {
      return;
    }
    if (std::FILE* file = std::fopen(json_.c_str(), "a")) {
      std::fprintf(
          file,
          "{\"program\": \"cuda_probe\", \"case\": \"%s\", \"ms\": %.6g, \"bytes\": %.6g}\n",
          name,
          ms,
          num_bytes);
      std::fclose(file);
    }
  }

  std::string json_;
  cudaDeviceProp properties_ = {};
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  uint32_t* sink_ = nullptr;
  double low_ = 0;
  double high_ = 0;
};

int run(int argc, char** argv) {
  std::string json;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
      json = argv[++i];
    } else if (std::strcmp(argv[i], "--quick") != 0) {
      std::fprintf(stderr, "usage: %s [--json FILE] [--quick]\n", argv[0]);
      return 2;
    }
  }
  Probe probe(json);
  probe.memory(int64_t{4} << 30);
  for (const int blocks_per_sm : {1, 2, 3}) {
    probe.boxes(int64_t{24} << 20, blocks_per_sm);
  }
  probe.boxes(int64_t{2} << 30, 3);
  probe.launches(false);
  probe.launches(true);
  probe.grid_barrier();
  return 0;
}

}  // namespace
}  // namespace longspan::cuda

int main(int argc, char** argv) { return longspan::cuda::run(argc, argv); }
