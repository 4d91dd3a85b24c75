// The four stages on the CPU: which pieces of work there are, shared out to threads. The vector
// code is behind Target.
#pragma once

#include <cstddef>
#include <vector>

#include "base/device.h"
#include "base/status.h"
#include "kernels/params.h"
#include "kernels/simd/target.h"
#include "kernels/simd/thread_pool.h"

namespace longspan::simd {

// Memory that one thread takes apart for a task; kept between calls, grown when a call needs more.
class Arena {
 public:
  // Makes room for `num_bytes` in takes of at most `num_takes`; what was taken before is gone.
  Status reserve(size_t num_bytes, size_t num_takes);
  // Uninitialised, aligned to 64 bytes. What is taken must fit in what was reserved.
  template <class T>
  T* take(size_t count) {
    return reinterpret_cast<T*>(take_bytes(count * sizeof(T)));
  }
  void reset() { used_ = 0; }

 private:
  std::byte* take_bytes(size_t num_bytes);

  Buffer buffer_;
  size_t used_ = 0;
};

// What the stages of a backend share. Not owned: the target.
struct Machine {
  explicit Machine(const Target& target_, int num_threads)
      : target(target_), pool(num_threads), arenas(static_cast<size_t>(pool.num_threads())) {}

  const Target& target;
  ThreadPool pool;
  std::vector<Arena> arenas;  // one for each thread
  Arena shared;               // for what tasks leave to each other
};

Status summarize(const SummarizeParams& params, Machine& machine);
Status search(const SearchParams& params, Machine& machine);
Status attend(const AttendParams& params, Machine& machine);
Status merge(const MergeParams& params, Machine& machine);

}  // namespace longspan::simd
