// What the benchmarks of the GPU's kernels share: options, device memory, random fill, times.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "base/data_type.h"
#include "kernels/cuda/device_info.h"

namespace longspan::cuda {

inline constexpr double kPeakGigabytes = 3000;  // per second: what the memory of an H100 gives
inline constexpr double kPeakTeraflops = 790;   // bf16

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    std::printf("FATAL %s: %s\n", call, cudaGetErrorString(error));
    std::fflush(stdout);
    std::exit(2);
  }
}
#define CHECK_CUDA(call) check((call), #call)

struct BenchOptions {
  bool quick = false;  // checks alone
  uint64_t seed = static_cast<uint64_t>(std::random_device{}());
  std::string only;  // the checks whose names have this text
  std::string json;  // a line for each timed case is added to this file
};

// Ends the program, with the usage, at what it does not know.
inline BenchOptions parse_options(int argc, char** argv) {
  BenchOptions options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool has_value = i + 1 < argc;
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--seed" && has_value) {
      options.seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--only" && has_value) {
      options.only = argv[++i];
    } else if (argument == "--json" && has_value) {
      options.json = argv[++i];
    } else {
      std::fprintf(stderr, "usage: %s [--quick] [--seed N] [--only TEXT] [--json FILE]\n", argv[0]);
      std::exit(2);
    }
  }
  return options;
}

// The first device, whose name it prints with the seed.
inline DeviceInfo open_device(uint64_t seed) {
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
  DeviceInfo device;
  device.compute_major = properties.major;
  device.compute_minor = properties.minor;
  device.num_sms = properties.multiProcessorCount;
  device.shared_memory_per_block = properties.sharedMemPerBlockOptin;
  device.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
  std::printf("%s, %d SMs; seed %llu\n",
              properties.name,
              device.num_sms,
              static_cast<unsigned long long>(seed));
  return device;
}

// Whether a case passed; the first mismatch is printed.
struct Verdict {
  bool passed = true;

  void fail(const char* what, int64_t list, int64_t place, double got, double expected) {
    if (passed) {
      std::printf("  list %lld place %lld: %s, got %.9g expected %.9g\n",
                  static_cast<long long>(list),
                  static_cast<long long>(place),
                  what,
                  got,
                  expected);
    }
    passed = false;
  }
};

inline std::vector<std::byte> encode(DataType type, const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * size_of(type));
  for (size_t i = 0; i < values.size(); ++i) {
    store_element(type, bytes.data(), i, values[i]);
  }
  return bytes;
}

template <class T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    void* data = nullptr;
    CHECK_CUDA(cudaMalloc(&data, std::max<size_t>(1, count) * sizeof(T)));
    data_ = static_cast<T*>(data);
  }
  explicit Device(const std::vector<T>& host) : Device(host.size()) {
    if (count_ > 0) {
      CHECK_CUDA(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
    }
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  std::vector<T> host() const {
    std::vector<T> result(count_);
    if (count_ > 0) {
      CHECK_CUDA(cudaMemcpy(result.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    }
    return result;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// Uniform in [-1, 1), from the index.
static __global__ void fill_kernel(__nv_bfloat16* data, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ULL + seed;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    x ^= x >> 31;
    data[i] = __float2bfloat16_rn(static_cast<float>(static_cast<int32_t>(x >> 32)) * 0x1p-31F);
  }
}

inline void fill(__nv_bfloat16* data, size_t count, uint32_t seed) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1056);
  config.blockDim = dim3(256);
  CHECK_CUDA(cudaLaunchKernelEx(&config, fill_kernel, data, count, seed));
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Milliseconds of one call, of several measured one by one.
struct Samples {
  double median = 0;
  double least = 0;
  double most = 0;
};

inline Samples sample(int repeats, const std::function<void(cudaStream_t)>& call) {
  constexpr int kWarmUps = 3;
  cudaEvent_t begin;
  cudaEvent_t end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  std::vector<double> samples;
  for (int i = 0; i < repeats + kWarmUps; ++i) {
    CHECK_CUDA(cudaEventRecord(begin, nullptr));
    call(nullptr);
    CHECK_CUDA(cudaEventRecord(end, nullptr));
    CHECK_CUDA(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= kWarmUps) {
      samples.push_back(static_cast<double>(milliseconds));
    }
  }
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  const auto [least, most] = std::minmax_element(samples.begin(), samples.end());
  return {median(samples), *least, *most};
}

// Adds a line for a timed case to a file, unless its name is empty.
inline void append_json(const std::string& path,
                        const char* program,
                        const std::string& name,
                        const Samples& time,
                        double flop,
                        double bytes,
                        double floor,
                        bool right) {
  std::FILE* file = path.empty() ? nullptr : std::fopen(path.c_str(), "a");
  if (file == nullptr) {
    return;
  }
  std::fprintf(file,
               "{\"program\": \"%s\", \"case\": \"%s\", \"ms\": %.6f, \"ms_min\": %.6f, "
               "\"ms_max\": %.6f, \"flops\": %.0f, \"bytes\": %.0f, \"floor_ms\": %.6f, "
               "\"ok\": %s}\n",
               program,
               name.c_str(),
               time.median,
               time.least,
               time.most,
               flop,
               bytes,
               floor,
               right ? "true" : "false");
  std::fclose(file);
}

// Milliseconds of one call: of single launches between events, and inside a graph of many.
struct Times {
  double single = 0;
  double in_graph = 0;
  double least = 0;  // in a graph
  double most = 0;
};

inline Times time_calls(const std::function<void(int, cudaStream_t)>& call, int repeats) {
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreate(&stream));
  cudaEvent_t begin;
  cudaEvent_t end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  const auto elapsed = [&] {
    float milliseconds = 0;
    CHECK_CUDA(cudaEventSynchronize(end));
    CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
    return static_cast<double>(milliseconds);
  };
  Times times;
  std::vector<double> samples;
  for (int i = 0; i < repeats + 5; ++i) {
    CHECK_CUDA(cudaEventRecord(begin, stream));
    call(i, stream);
    CHECK_CUDA(cudaEventRecord(end, stream));
    samples.push_back(elapsed());
  }
  times.single = median({samples.begin() + 5, samples.end()});

  constexpr int kCalls = 20;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kCalls; ++i) {
    call(i, stream);
  }
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  samples.clear();
  for (int i = 0; i < repeats / 4 + 3; ++i) {
    CHECK_CUDA(cudaEventRecord(begin, stream));
    CHECK_CUDA(cudaGraphLaunch(executable, stream));
    CHECK_CUDA(cudaEventRecord(end, stream));
    samples.push_back(elapsed() / kCalls);
  }
  times.in_graph = median({samples.begin() + 2, samples.end()});
  const auto [least, most] = std::minmax_element(samples.begin() + 2, samples.end());
  times.least = *least;
  times.most = *most;
  CHECK_CUDA(cudaGraphExecDestroy(executable));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  CHECK_CUDA(cudaStreamDestroy(stream));
  return times;
}

}  // namespace longspan::cuda
