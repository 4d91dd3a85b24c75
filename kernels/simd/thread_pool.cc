#include "kernels/simd/thread_pool.h"

#include <system_error>

namespace longspan::simd {

ThreadPool::ThreadPool(int num_threads) {
  threads_.reserve(static_cast<size_t>(num_threads));
  for (int thread = 1; thread < num_threads; ++thread) {
    try {
      threads_.emplace_back([this, thread] { serve(thread); });
    } catch (const std::system_error&) {
      return;
    }
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) {
    thread.join();
  }
}

void ThreadPool::run(int64_t num_tasks, const Task& task) {
  if (num_tasks <= 1 || threads_.empty()) {
    next_.store(0, std::memory_order_relaxed);
    work(task, num_tasks, 0);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    next_.store(0, std::memory_order_relaxed);
    task_ = &task;
    num_tasks_ = num_tasks;
    num_working_ = static_cast<int>(threads_.size());
    ++generation_;
  }
  wake_.notify_all();
  work(task, num_tasks, 0);
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return num_working_ == 0; });
}

void ThreadPool::serve(int thread) {
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
    if (stopping_) {
      return;
    }
    seen = generation_;
    const Task* task = task_;
    const int64_t num_tasks = num_tasks_;
    lock.unlock();
    work(*task, num_tasks, thread);
    lock.lock();
    if (--num_working_ == 0) {
      done_.notify_one();
    }
  }
}

void ThreadPool::work(const Task& task, int64_t num_tasks, int thread) {
  for (int64_t index = next_.fetch_add(1, std::memory_order_relaxed); index < num_tasks;
       index = next_.fetch_add(1, std::memory_order_relaxed)) {
    task(index, thread);
  }
}

}  // namespace longspan::simd
