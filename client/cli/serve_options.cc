// The table of the server's options.

#include "client/cli/serve.h"
#include "kernels/backend.h"

namespace longspan {
namespace {

constexpr int64_t kMillion = 1'000'000;
constexpr int64_t kMaxPort = 65535;
constexpr int64_t kMaxMessageBytes = int64_t{1} << 30;
constexpr int64_t kDay = 86'400'000;

void add_placement(ServeConfig& config, Options& options) {
  options.push_back({"host", &config.host, "Address that the gRPC server listens on"});
  options.push_back({"port", &config.port, "Its TCP port; 0: any free one", 0, kMaxPort});
  options.push_back(
      {"metrics_host", &config.metrics_host, "Address of the HTTP server with /metrics"});
  options.push_back(
      {"metrics_port", &config.metrics_port, "Its TCP port; 0: any free one", 0, kMaxPort});
  options.push_back({"ranks", &config.ranks, "Ranks that share each context", 1, 64});
  options.push_back({.name = "backend",
                     .target = &config.backend,
                     .help = "Backend of the kernels",
                     .choices = backend_names()});
  options.push_back({"threads_per_rank",
                     &config.threads_per_rank,
                     "Threads of each rank; 0: the machine's cores shared among the ranks",
                     0,
                     1024});
  options.push_back({"kv_capacity",
                     &config.kv_capacity,
                     "Memory for keys, values and summaries, over all ranks",
                     int64_t{1} << 20,
                     int64_t{1} << 50,
                     Option::Unit::kBytes});
  options.push_back({"methods_dir",
                     &config.methods_dir,
                     "Directory of the shipped methods, *.txtpb; empty: the built-in one"});
  options.push_back({"default_method",
                     &config.default_method,
                     "Shipped method that clients are told to use unless they know better; empty: "
                     "block_topk, or dense where that is not shipped"});
  options.push_back({.name = "log_level",
                     .target = &config.log_level,
                     .help = "Least severe lines that are logged",
                     .choices = {"trace", "debug", "info", "warning", "error", "off"}});
  options.push_back({.name = "log_format",
                     .target = &config.log_format,
                     .help = "Form of the log's lines",
                     .choices = {"text", "json"}});
}

void add_limits(ServeConfig& config, Options& options) {
  options.push_back({"max_message_bytes",
                     &config.max_message_bytes,
                     "Largest gRPC message",
                     int64_t{1} << 16,
                     kMaxMessageBytes,
                     Option::Unit::kBytes});
  options.push_back({"max_chunk_bytes",
                     &config.max_chunk_bytes,
                     "Most keys and values in one chunk of Append",
                     1024,
                     kMaxMessageBytes,
                     Option::Unit::kBytes});
  options.push_back(
      {"max_batch_items", &config.max_batch_items, "Items of one Decode or step", 1, kMillion});
  options.push_back({"max_stream_contexts",
                     &config.max_stream_contexts,
                     "Contexts of one DecodeStream",
                     1,
                     kMillion});
  options.push_back({"max_stream_window",
                     &config.max_stream_window,
                     "Steps in flight on one DecodeStream",
                     1,
                     1024});
  options.push_back({"max_context_tokens",
                     &config.max_context_tokens,
                     "Tokens of one context",
                     64,
                     int64_t{1} << 40});
  options.push_back({"max_contexts", &config.max_contexts, "Contexts at a time", 1, kMillion});
  options.push_back({"max_layers", &config.max_layers, "Layers of a context", 1, 4096});
  options.push_back(
      {"max_query_heads", &config.max_query_heads, "Query heads of a context", 1, 4096});
  options.push_back(
      {"max_prefill_rows", &config.max_prefill_rows, "Rows of one chunk of Prefill", 1, kMillion});
  options.push_back(
      {"max_decode_rows", &config.max_decode_rows, "Rows of one item of Decode", 1, kMillion});
  options.push_back({"max_queue_depth",
                     &config.max_queue_depth,
                     "Items that may wait for the engine",
                     1,
                     10 * kMillion});
  options.push_back({"max_queue_bytes",
                     &config.max_queue_bytes,
                     "Tensors that may wait for the engine",
                     int64_t{1} << 20,
                     int64_t{1} << 40,
                     Option::Unit::kBytes});
  options.push_back({"max_connection_streams",
                     &config.max_connection_streams,
                     "Calls in flight on one connection",
                     1,
                     kMillion});
}

void add_times(ServeConfig& config, Options& options) {
  options.push_back({"decode_deadline",
                     &config.decode_deadline,
                     "Deadline of a Decode or step whose caller gives none",
                     1,
                     kDay});
  options.push_back({"prefill_deadline",
                     &config.prefill_deadline,
                     "The same of a chunk of Prefill, and of Explain",
                     1,
                     kDay});
  options.push_back({"append_deadline",
                     &config.append_deadline,
                     "The same of a chunk of Append; also how long the next one may take to come",
                     1,
                     kDay});
  options.push_back({"stall_timeout",
                     &config.stall_timeout,
                     "How long a client may leave an answer unread",
                     10,
                     kDay});
  options.push_back({"drain_timeout",
                     &config.drain_timeout,
                     "How long calls may take to finish after SIGTERM",
                     0,
                     kDay});
  options.push_back({"lease_check_interval",
                     &config.lease_check_interval,
                     "Time between checks of leases and streams",
                     10,
                     60'000});
}

}  // namespace

Options serve_options(ServeConfig& config) {
  Options options;
  add_placement(config, options);
  add_limits(config, options);
  add_times(config, options);
  return options;
}

}  // namespace longspan
