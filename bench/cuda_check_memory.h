// What cuda_prefill and cuda_decode share: device memory that starts as poison, and random bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

namespace longspan::cuda {
namespace {

bool succeeded(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    std::printf("  %s: %s\n", what, cudaGetErrorString(error));
  }
  return error == cudaSuccess;
}

// Device memory of a check; a failure to allocate ends the program.
template <class T>
class Memory {
 public:
  explicit Memory(size_t count) : count_(count) {
    if (!succeeded(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc")) {
      std::exit(2);
    }
    poison();
  }
  explicit Memory(const std::vector<T>& host) : Memory(host.size()) {
    cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  void poison() { cudaMemset(data_, 0xff, count_ * sizeof(T)); }
  std::vector<T> host() const {
    std::vector<T> copy(count_);
    cudaMemcpy(copy.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost);
    return copy;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace
}  // namespace longspan::cuda
