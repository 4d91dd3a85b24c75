// The interface that every backend implements: the four stages of the pipeline on one shard.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/device.h"
#include "base/status.h"
#include "kernels/params.h"

namespace longspan {

// What a context asks of a backend.
struct Problem {
  const Method* method = nullptr;
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int key_dim = 0;
  int value_dim = 0;
  DataType kv_dtype = DataType::kBFloat16;
};

struct BackendOptions {
  int num_threads = 1;  // for the rows of one call
};

// Where the arrays of a call lie: every pointer of its parameters, but for the specs.
enum class BackendMemory : uint8_t { kHost, kDevice };

// Thread-compatible: one engine thread calls it, with the stream of that thread. Arguments are
// trusted (the caller has validated them); a Status reports what the machine could not do.
class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;
  // What run-time dispatch chose, for people: "AVX-512 BF16, 2 threads".
  virtual std::string detail() const = 0;
  virtual BackendMemory memory() const { return BackendMemory::kHost; }
  // OK, or UNIMPLEMENTED with the reason.
  virtual Status supports(const Problem& problem) const = 0;

  virtual Status summarize(const SummarizeParams& params, Stream& stream) = 0;
  virtual Status search(const SearchParams& params, Stream& stream) = 0;
  virtual Status attend(const AttendParams& params, Stream& stream) = 0;
  virtual Status merge(const MergeParams& params, Stream& stream) = 0;
};

// "simd", "reference", "cuda" in a build with it. NOT_FOUND lists the names that this build has.
StatusOr<std::unique_ptr<Backend>> make_backend(std::string_view name,
                                                const BackendOptions& options);
std::vector<std::string> backend_names();

}  // namespace longspan
