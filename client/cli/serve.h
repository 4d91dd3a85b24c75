// The embedded server: coordinator and one group of in-process ranks behind one gRPC port. The
// composition root that `longspan serve` starts.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "base/config.h"

namespace longspan {

struct ServeConfig {
  std::string host = "127.0.0.1";
  int64_t port = 7077;
  std::string metrics_host = "127.0.0.1";
  int64_t metrics_port = 7078;

  int64_t ranks = 1;
  std::string backend = "simd";
  int64_t threads_per_rank = 0;  // 0: the machine's cores shared among the ranks
  int64_t kv_capacity = int64_t{4} << 30;
  std::string methods_dir;     // empty: the one that this build knows
  std::string default_method;  // empty: block_topk where it is shipped, else dense

  std::string log_level = "info";
  std::string log_format = "text";

  int64_t max_message_bytes = int64_t{64} << 20;
  int64_t max_chunk_bytes = int64_t{4} << 20;
  int64_t max_batch_items = 4096;
  int64_t max_stream_contexts = 1024;
  int64_t max_stream_window = 16;
  int64_t max_context_tokens = int64_t{16} << 20;
  int64_t max_contexts = 4096;
  int64_t max_layers = 512;
  int64_t max_query_heads = 1024;
  int64_t max_prefill_rows = 4096;
  int64_t max_decode_rows = 64;
  int64_t max_queue_depth = 16384;
  int64_t max_queue_bytes = int64_t{1} << 30;
  int64_t max_connection_streams = 1024;

  std::chrono::milliseconds decode_deadline{2'000};
  std::chrono::milliseconds prefill_deadline{60'000};
  std::chrono::milliseconds append_deadline{30'000};
  std::chrono::milliseconds stall_timeout{30'000};
  std::chrono::milliseconds drain_timeout{10'000};
  std::chrono::milliseconds lease_check_interval{500};
};

// The options of a server, bound to `config`.
Options serve_options(ServeConfig& config);

// Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once. Prints
// "serving on host:port (metrics on host:port)" when ready. Returns the process's exit code.
int serve(const ServeConfig& config);

}  // namespace longspan
