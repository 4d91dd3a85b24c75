// `longspan bench`: fills a context of random keys and decodes against it in a closed loop.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <memory>
#include <numeric>
#include <optional>

#include "absl/strings/str_cat.h"

#include "client/cli/commands.h"
#include "client/cli/context_spec.h"
#include "client/cli/random_rows.h"
#include "client/cli/text.h"
#include "client/cpp/errors.h"

namespace longspan::cli {
namespace {

using Json = nlohmann::ordered_json;
using std::chrono::steady_clock;

// Tokens of one layer that are made at a time.
constexpr int64_t kFillTokens = 4096;
// The context expires by itself when this process dies.
constexpr double kLeaseSeconds = 600;

struct BenchOptions {
  SpecOptions spec;
  int64_t tokens = int64_t{1} << 16;
  int64_t steps = 100;
  uint32_t warmup = 10;
  bool unary = false;
  uint64_t seed = 1;
};

struct Measurement {
  std::string method;
  std::vector<double> call_seconds;  // one layer of one token each, sorted
  double read_fraction = 0;

  double percentile(double share) const {
    const auto rank = static_cast<size_t>(std::ceil(share * call_seconds.size()));
    return call_seconds[std::max<size_t>(rank, 1) - 1];
  }
  double mean() const {
    return std::accumulate(call_seconds.begin(), call_seconds.end(), 0.0) / call_seconds.size();
  }
};

// Ctrl-C ends the work in good order: the context is deleted.
std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler writes it");

Status check_interrupt() {
  return interrupted ? absl::CancelledError("interrupted") : absl::OkStatus();
}

// The benchmark of one context; made, filled and measured in this order.
class Bench {
 public:
  Bench(const Invocation& invocation, const BenchOptions& options)
      : invocation_(invocation),
        options_(options),
        server_(invocation.connect()),
        random_(options.seed) {}

  Status prepare();
  Status fill();
  StatusOr<Measurement> measure(const v1::Method& method);
  Status remove() { return context_ ? context_->remove(true) : absl::OkStatus(); }

  const v1::ContextSpec& spec() const { return spec_; }
  const v1::GetCapabilitiesResponse& capabilities() const { return capabilities_; }
  double fill_seconds() const { return fill_seconds_; }
  uint64_t bytes() const { return bytes_; }

 private:
  // Storage of the rows of one call.
  struct Buffers {
    std::string query;
    std::string key;
    std::string value;
    std::string gates;
    std::string search_query;
  };

  client::AttentionRows make_rows(const v1::Method& method, bool with_keys, Buffers& buffers);
  StatusOr<double> decode_call(const v1::Method& method,
                               uint32_t layer,
                               int64_t position,
                               client::DecodeStream* stream);
  Status decode_steps(const v1::Method& method,
                      int64_t first_step,
                      int64_t num_steps,
                      client::DecodeStream* stream,
                      Progress& progress,
                      std::vector<double>* seconds);
  StatusOr<double> read_fraction(const v1::Method& method);

  const Invocation& invocation_;
  const BenchOptions& options_;
  std::unique_ptr<client::Client> server_;
  RandomRows random_;
  v1::GetCapabilitiesResponse capabilities_;
  v1::ContextSpec spec_;
  std::optional<client::Context> context_;
  double fill_seconds_ = 0;
  uint64_t bytes_ = 0;
};

Status Bench::prepare() {
  SpecOptions spec = options_.spec;
  spec.ttl_seconds = kLeaseSeconds;
  LONGSPAN_ASSIGN_OR_RETURN(capabilities_, server_->capabilities());
  if (spec.methods.empty()) {
    spec.methods.push_back(capabilities_.default_method());
  }
  LONGSPAN_ASSIGN_OR_RETURN(spec_, make_spec(*server_, spec));
  LONGSPAN_ASSIGN_OR_RETURN(context_, server_->create_context(spec_));
  return absl::OkStatus();
}

Status Bench::fill() {
  const SpecOptions& shape = options_.spec;
  const auto total = static_cast<uint64_t>(options_.tokens) * shape.layers;
  Progress progress("fill", total, "tokens of a layer", invocation_.quiet);
  const auto stream = context_->append_stream();
  std::string key_storage;
  std::string value_storage;
  uint64_t done = 0;
  for (int64_t begin = 0; begin < options_.tokens; begin += kFillTokens) {
    const int64_t count = std::min(kFillTokens, options_.tokens - begin);
    for (uint32_t layer = 0; layer < shape.layers; ++layer) {
      LONGSPAN_RETURN_IF_ERROR(check_interrupt());
      const DataType type = cache_type(shape);
      const auto key = random_.make(key_storage, type, count, shape.kv_heads, shape.head_dim);
      const auto value =
          random_.make(value_storage, type, count, shape.kv_heads, shape.value_dim());
      LONGSPAN_RETURN_IF_ERROR(stream->write(layer, static_cast<uint64_t>(begin), key, value));
      bytes_ += key_storage.size() + value_storage.size();
      done += static_cast<uint64_t>(count);
      progress.update(done);
    }
  }
  LONGSPAN_RETURN_IF_ERROR(stream->finish().status());
  fill_seconds_ = progress.seconds();
  return absl::OkStatus();
}

client::AttentionRows Bench::make_rows(const v1::Method& method, bool with_keys, Buffers& buffers) {
  const SpecOptions& shape = options_.spec;
  const DataType type = cache_type(shape);
  client::AttentionRows rows;
  rows.query = random_.make(buffers.query, type, 1, shape.query_heads, shape.head_dim);
  if (with_keys) {
    rows.key = random_.make(buffers.key, type, 1, shape.kv_heads, shape.head_dim);
    rows.value = random_.make(buffers.value, type, 1, shape.kv_heads, shape.value_dim());
  }
  if (needs_gates(method)) {
    rows.gates = random_.make(
        buffers.gates, DataType::kFloat32, 1, shape.query_heads, method.branches_size());
  }
  if (needs_search_query(method)) {
    rows.search_query =
        random_.make(buffers.search_query, type, 1, shape.query_heads, shape.head_dim);
  }
  return rows;
}

// Seconds of one call, from sending to the answer. The answer is checked.
StatusOr<double> Bench::decode_call(const v1::Method& method,
                                    uint32_t layer,
                                    int64_t position,
                                    client::DecodeStream* stream) {
  Buffers buffers;
  const auto rows = make_rows(method, true, buffers);
  std::vector<v1::DecodeItem> items;
  items.push_back(context_->decode_item(layer, position, rows, client::with_method(method.name())));
  const auto start = steady_clock::now();
  auto results = stream != nullptr ? stream->step(std::move(items)) : server_->decode(items);
  const double seconds = std::chrono::duration<double>(steady_clock::now() - start).count();
  LONGSPAN_RETURN_IF_ERROR(results.status());
  if (results->size() != 1) {
    return absl::InternalError("the server answered another number of items than were sent");
  }
  LONGSPAN_RETURN_IF_ERROR(client::from_rpc((*results)[0].status()));
  LONGSPAN_ASSIGN_OR_RETURN(const auto output, client::to_floats((*results)[0].output()));
  if (output.size() != size_t{options_.spec.query_heads} * options_.spec.value_dim() ||
      !std::all_of(output.begin(), output.end(), [](float x) { return std::isfinite(x); })) {
    return absl::InternalError("the server answered an output of the wrong size, or not finite");
  }
  return seconds;
}

// Each step is one token through all layers, as an engine decodes.
Status Bench::decode_steps(const v1::Method& method,
                           int64_t first_step,
                           int64_t num_steps,
                           client::DecodeStream* stream,
                           Progress& progress,
                           std::vector<double>* seconds) {
  for (int64_t step = first_step; step < first_step + num_steps; ++step) {
    for (uint32_t layer = 0; layer < options_.spec.layers; ++layer) {
      LONGSPAN_RETURN_IF_ERROR(check_interrupt());
      LONGSPAN_ASSIGN_OR_RETURN(const double call,
                                decode_call(method, layer, options_.tokens + step, stream));
      if (seconds != nullptr) {
        seconds->push_back(call);
      }
    }
    progress.update(static_cast<uint64_t>(step + 1));
  }
  return absl::OkStatus();
}

// The mean over the layers, of which a method may keep some dense.
StatusOr<double> Bench::read_fraction(const v1::Method& method) {
  double sum = 0;
  for (uint32_t layer = 0; layer < options_.spec.layers; ++layer) {
    Buffers buffers;
    v1::ExplainRequest request;
    request.set_layer(layer);
    request.set_method_name(method.name());
    client::fill_rows(make_rows(method, false, buffers), request);
    LONGSPAN_ASSIGN_OR_RETURN(const auto response, context_->explain(std::move(request)));
    sum += response.read_fraction();
  }
  return sum / options_.spec.layers;
}

StatusOr<Measurement> Bench::measure(const v1::Method& method) {
  Measurement measurement{.method = method.name(), .call_seconds = {}};
  std::unique_ptr<client::DecodeStream> stream;
  if (!options_.unary) {
    LONGSPAN_ASSIGN_OR_RETURN(stream, server_->decode_stream(std::vector{context_->id()}));
  }
  {
    Progress progress("decode " + method.name(),
                      options_.warmup + static_cast<uint64_t>(options_.steps),
                      "tokens",
                      invocation_.quiet);
    LONGSPAN_RETURN_IF_ERROR(
        decode_steps(method, 0, options_.warmup, stream.get(), progress, nullptr));
    LONGSPAN_RETURN_IF_ERROR(decode_steps(method,
                                          options_.warmup,
                                          options_.steps,
                                          stream.get(),
                                          progress,
                                          &measurement.call_seconds));
  }
  if (stream != nullptr) {
    LONGSPAN_RETURN_IF_ERROR(stream->finish());
  }
  std::sort(measurement.call_seconds.begin(), measurement.call_seconds.end());
  LONGSPAN_ASSIGN_OR_RETURN(measurement.read_fraction, read_fraction(method));
  // The next method decodes against the same tokens.
  LONGSPAN_RETURN_IF_ERROR(context_->truncate(static_cast<uint64_t>(options_.tokens)).status());
  return measurement;
}

double tokens_per_second(const Measurement& measurement, uint32_t layers) {
  return 1.0 / (measurement.mean() * layers);
}

void print_table(const Bench& bench,
                 const BenchOptions& options,
                 const std::vector<Measurement>& measurements) {
  std::printf("%s tokens x %u layers, %u query heads, %u key-value heads, head size %u, %s\n",
              format_count(static_cast<uint64_t>(options.tokens)).c_str(),
              options.spec.layers,
              options.spec.query_heads,
              options.spec.kv_heads,
              options.spec.head_dim,
              options.spec.kv_dtype.c_str());
  std::printf("server %s, backend %s (%s), %u ranks\n",
              bench.capabilities().server_version().c_str(),
              bench.capabilities().backend().c_str(),
              bench.capabilities().backend_detail().c_str(),
              bench.capabilities().num_ranks());
  const auto bytes = static_cast<double>(bench.bytes());
  std::printf("filled %s in %s s: %s/s\n\n",
              format_bytes(bytes).c_str(),
              format_fixed(bench.fill_seconds(), 2).c_str(),
              format_bytes(bytes / bench.fill_seconds()).c_str());
  Table table({"METHOD", "P50 us", "P90 us", "P99 us", "MEAN us", "TOKENS/s", "KEYS READ %"});
  for (const Measurement& measurement : measurements) {
    table.add({measurement.method,
               format_fixed(1e6 * measurement.percentile(0.5), 0),
               format_fixed(1e6 * measurement.percentile(0.9), 0),
               format_fixed(1e6 * measurement.percentile(0.99), 0),
               format_fixed(1e6 * measurement.mean(), 0),
               format_fixed(tokens_per_second(measurement, options.spec.layers), 1),
               format_fixed(100 * measurement.read_fraction, 2)});
  }
  table.print();
  std::printf("\nlatencies of one call: one token, one layer; %lld tokens after %u to warm up\n",
              static_cast<long long>(options.steps),
              options.warmup);
}

void print_as_json(const Bench& bench,
                   const BenchOptions& options,
                   const std::vector<Measurement>& measurements) {
  Json results = Json::array();
  for (const Measurement& measurement : measurements) {
    results.push_back({{"method", measurement.method},
                       {"calls", measurement.call_seconds.size()},
                       {"p50_us", 1e6 * measurement.percentile(0.5)},
                       {"p90_us", 1e6 * measurement.percentile(0.9)},
                       {"p99_us", 1e6 * measurement.percentile(0.99)},
                       {"mean_us", 1e6 * measurement.mean()},
                       {"tokens_per_second", tokens_per_second(measurement, options.spec.layers)},
                       {"read_fraction", measurement.read_fraction}});
  }
  const v1::GetCapabilitiesResponse& server = bench.capabilities();
  print_json({{"server",
               {{"version", server.server_version()},
                {"backend", server.backend()},
                {"backend_detail", server.backend_detail()},
                {"num_ranks", server.num_ranks()}}},
              {"context",
               {{"tokens", options.tokens},
                {"num_layers", options.spec.layers},
                {"num_query_heads", options.spec.query_heads},
                {"num_kv_heads", options.spec.kv_heads},
                {"key_head_dim", options.spec.head_dim},
                {"value_head_dim", options.spec.value_dim()},
                {"kv_dtype", options.spec.kv_dtype}}},
              {"fill",
               {{"seconds", bench.fill_seconds()},
                {"bytes", bench.bytes()},
                {"bytes_per_second", static_cast<double>(bench.bytes()) / bench.fill_seconds()}}},
              {"unary", options.unary},
              {"steps", options.steps},
              {"warmup", options.warmup},
              {"seed", options.seed},
              {"results", results}});
}

StatusOr<std::vector<Measurement>> run_all(Bench& bench) {
  LONGSPAN_RETURN_IF_ERROR(bench.prepare());
  LONGSPAN_RETURN_IF_ERROR(bench.fill());
  std::vector<Measurement> measurements;
  for (const v1::Method& method : bench.spec().methods()) {
    LONGSPAN_ASSIGN_OR_RETURN(Measurement measurement, bench.measure(method));
    measurements.push_back(std::move(measurement));
  }
  return measurements;
}

int run_bench(const Invocation& invocation, const BenchOptions& options) {
  std::signal(SIGINT, [](int) { interrupted = true; });
  Bench bench(invocation, options);
  const auto measurements = run_all(bench);
  const Status removed = bench.remove();
  if (!measurements.ok()) {
    return report(invocation, measurements.status());
  }
  if (!removed.ok()) {
    return report(invocation, removed);
  }
  if (invocation.json()) {
    print_as_json(bench, options, *measurements);
  } else {
    print_table(bench, options, *measurements);
  }
  return 0;
}

}  // namespace

void add_bench_command(CLI::App& app, Invocation& invocation) {
  auto* command = app.add_subcommand("bench", "Measure decoding against a context of random keys");
  auto options = std::make_shared<BenchOptions>();
  command->add_option("--tokens", options->tokens, "length of the context")
      ->check(whole_number(1))
      ->capture_default_str();
  add_method_option(*command, options->spec, invocation);
  command->add_option("--steps", options->steps, "tokens to decode with each method")
      ->check(whole_number(1))
      ->capture_default_str();
  command->add_option("--warmup", options->warmup, "tokens to decode before that")
      ->capture_default_str();
  command->add_flag("--unary", options->unary, "one call a layer instead of a stream");
  command->add_option("--seed", options->seed, "of keys, values and queries")
      ->check(whole_number())
      ->capture_default_str();
  add_shape_options(*command, options->spec, invocation, false);
  command->callback([&invocation, options] {
    invocation.action = [&invocation, options] { return run_bench(invocation, *options); };
  });
}

}  // namespace longspan::cli
