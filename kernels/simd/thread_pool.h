// Threads that share the tasks of one call.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace longspan::simd {

// The caller of run() is thread 0 and works too. One caller at a time. Where the system has no
// threads left, there are fewer.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls task(index, thread) for each index in [0, num_tasks), in rising order of the index but
  // for what runs at once; returns when all are done.
  using Task = std::function<void(int64_t index, int thread)>;
  void run(int64_t num_tasks, const Task& task);

 private:
  void serve(int thread);
  void work(const Task& task, int64_t num_tasks, int thread);

  std::vector<std::thread> threads_;
  std::atomic<int64_t> next_{0};

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  const Task* task_ = nullptr;  // guarded by mutex_, as is the rest
  int64_t num_tasks_ = 0;
  uint64_t generation_ = 0;
  int num_working_ = 0;
  bool stopping_ = false;
};

}  // namespace longspan::simd
