#include "client/cli/serve.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <exception>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "google/protobuf/stubs/logging.h"
#include "grpc/health/v1/health.pb.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/resource_quota.h"
#include "prometheus/exposer.h"
#include "prometheus/registry.h"
#include <pthread.h>

#include "base/error_details.h"
#include "base/logging.h"
#include "base/metrics.h"
#include "base/rpc.h"
#include "base/stream_set.h"
#include "client/cli/lead_client.h"
#include "coordinator/coordinator.h"
#include "coordinator/service.h"
#include "kernels/backend.h"
#include "worker/lead.h"
#include "worker/method_codec.h"
#include "worker/service.h"
#include "worker/tensor_codec.h"

namespace longspan {
namespace {

constexpr char kDataPlane[] = "longspan.v1.AttentionService";
constexpr char kDenseMethod[] = "dense";
constexpr char kSparseMethod[] = "block_topk";
// What gRPC may hold beside the queue: messages that are being read or written.
constexpr int64_t kTransportBytes = int64_t{1} << 30;
constexpr uint32_t kMaxPageSize = 1000;
constexpr size_t kScrapers = 4;  // answered at a time

v1::Limits limits_of(const ServeConfig& config) {
  v1::Limits limits;
  limits.set_max_message_bytes(static_cast<uint64_t>(config.max_message_bytes));
  limits.set_max_chunk_bytes(static_cast<uint64_t>(config.max_chunk_bytes));
  limits.set_max_batch_items(static_cast<uint32_t>(config.max_batch_items));
  limits.set_max_stream_contexts(static_cast<uint32_t>(config.max_stream_contexts));
  limits.set_max_stream_window(static_cast<uint32_t>(config.max_stream_window));
  limits.set_max_page_size(kMaxPageSize);
  limits.set_max_context_tokens(static_cast<uint64_t>(config.max_context_tokens));
  limits.set_max_contexts(static_cast<uint32_t>(config.max_contexts));
  limits.set_max_layers(static_cast<uint32_t>(config.max_layers));
  limits.set_max_query_heads(static_cast<uint32_t>(config.max_query_heads));
  limits.set_kv_capacity_bytes(static_cast<uint64_t>(config.kv_capacity));
  limits.set_max_queue_depth(static_cast<uint32_t>(config.max_queue_depth));
  limits.set_max_prefill_rows(static_cast<uint32_t>(config.max_prefill_rows));
  limits.set_max_decode_rows(static_cast<uint32_t>(config.max_decode_rows));
  limits.set_max_queue_bytes(static_cast<uint64_t>(config.max_queue_bytes));
  return limits;
}

GroupOptions group_options_of(const ServeConfig& config) {
  GroupOptions options;
  options.num_ranks = static_cast<int>(config.ranks);
  options.backend = config.backend;
  const auto cores = static_cast<int64_t>(std::thread::hardware_concurrency());
  options.threads_per_rank =
      static_cast<int>(config.threads_per_rank > 0 ? config.threads_per_rank
                                                   : std::max<int64_t>(1, cores / config.ranks));
  options.kv_capacity_bytes = config.kv_capacity;
  return options;
}

bool has_method(const std::vector<v1::Method>& methods, const std::string& name) {
  return std::any_of(methods.begin(), methods.end(), [&name](const v1::Method& method) {
    return method.name() == name;
  });
}

// The methods of the directory, and dense, which every server has.
StatusOr<std::vector<v1::Method>> shipped_methods(const ServeConfig& config) {
  const std::string directory =
      config.methods_dir.empty() ? LONGSPAN_METHODS_DIR : config.methods_dir;
  LONGSPAN_ASSIGN_OR_RETURN(std::vector<v1::Method> methods, load_methods(directory));
  if (!has_method(methods, kDenseMethod)) {
    methods.insert(methods.begin(), encode_dense_method());
  }
  if (!config.default_method.empty() && !has_method(methods, config.default_method)) {
    return absl::InvalidArgumentError(
        absl::StrCat("default_method: ", directory, " has no \"", config.default_method, "\""));
  }
  return methods;
}

// The best of the curves in docs/performance.md, unless the operator has another opinion.
std::string default_method(const ServeConfig& config, const std::vector<v1::Method>& methods) {
  if (!config.default_method.empty()) {
    return config.default_method;
  }
  return has_method(methods, kSparseMethod) ? kSparseMethod : kDenseMethod;
}

// Writes every request to the log and the metrics.
class Observer final : public RequestObserver {
 public:
  Observer(Log& log, RequestMetrics& metrics) : log_(log), metrics_(metrics) {}
  void started(absl::string_view operation) override { metrics_.started(operation); }
  void finished(const RequestRecord& record) override {
    metrics_.finished(record);
    log_.request(record);
  }

 private:
  Log& log_;
  RequestMetrics& metrics_;
};

// Both clocks.
Moment now() { return {std::chrono::steady_clock::now(), std::chrono::system_clock::now()}; }

// Everything that a server owns, in the order in which it is built; taken down the other way round.
class EmbeddedServer {
 public:
  static StatusOr<std::unique_ptr<EmbeddedServer>> start(const ServeConfig& config);
  ~EmbeddedServer() { stop(); }
  EmbeddedServer(const EmbeddedServer&) = delete;
  EmbeddedServer& operator=(const EmbeddedServer&) = delete;

  std::string address() const { return absl::StrCat(config_.host, ":", port_); }
  std::string metrics_address() const {
    return absl::StrCat(config_.metrics_host, ":", exposer_->GetListeningPorts().front());
  }
  Log& log() { return log_; }

  // Takes nothing more, answers what was taken, within the drain's timeout. Idempotent.
  void stop();

 private:
  EmbeddedServer(const ServeConfig& config,
                 std::unique_ptr<Group> group,
                 std::unique_ptr<Backend> backend,
                 const std::vector<v1::Method>& methods);

  static std::set<std::string> names_of(const std::vector<v1::Method>& methods);
  ServerTerms terms() const;
  v1::GetCapabilitiesResponse capabilities(const std::vector<v1::Method>& methods) const;
  Status listen();
  Status expose();
  void keep_house(const std::stop_token& stopped);

  ServeConfig config_;
  std::unique_ptr<Backend> backend_;  // asked for what it supports only
  std::string backend_detail_;
  Log log_;
  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  std::shared_ptr<ProcessMetrics> process_metrics_;
  RequestMetrics request_metrics_{*registry_};
  WorkerMetrics worker_metrics_;
  CoordinatorMetrics coordinator_metrics_{*registry_};
  Observer observer_{log_, request_metrics_};
  StreamSet streams_;
  Lead lead_;
  LeadClient lead_client_;
  Coordinator coordinator_;
  ServiceEnvironment environment_;
  ControlEnvironment control_;
  std::unique_ptr<v1::AttentionService::Service> attention_;
  std::unique_ptr<v1::IntrospectService::Service> introspect_;
  std::unique_ptr<v1::ContextService::Service> contexts_;
  std::unique_ptr<v1::ServerService::Service> server_service_;
  std::unique_ptr<prometheus::Exposer> exposer_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
  std::jthread housekeeper_;
  bool stopped_ = false;
};

std::set<std::string> EmbeddedServer::names_of(const std::vector<v1::Method>& methods) {
  std::set<std::string> names;
  for (const v1::Method& method : methods) {
    names.insert(method.name());
  }
  return names;
}

EmbeddedServer::EmbeddedServer(const ServeConfig& config,
                               std::unique_ptr<Group> group,
                               std::unique_ptr<Backend> backend,
                               const std::vector<v1::Method>& methods)
    : config_(config),
      backend_(std::move(backend)),
      backend_detail_(group->backend_detail()),
      log_(config.log_level, config.log_format == "json" ? LogFormat::kJson : LogFormat::kText),
      process_metrics_(std::make_shared<ProcessMetrics>(LONGSPAN_VERSION)),
      worker_metrics_(*registry_, names_of(methods)),
      lead_(std::move(group),
            {.max_jobs = static_cast<int>(config.max_queue_depth),
             .max_bytes = config.max_queue_bytes},
            worker_metrics_),
      lead_client_(lead_, terms(), capabilities(methods)),
      coordinator_(
          lead_client_, coordinator_metrics_, static_cast<size_t>(config.max_contexts), now),
      environment_{.lead = lead_,
                   .terms = terms(),
                   .observer = observer_,
                   .metrics = worker_metrics_,
                   .streams = streams_,
                   .decode_deadline = config.decode_deadline,
                   .prefill_deadline = config.prefill_deadline,
                   .append_deadline = config.append_deadline,
                   .stall_timeout = config.stall_timeout},
      control_{.coordinator = coordinator_,
               .observer = observer_,
               .streams = streams_,
               .stall_timeout = config.stall_timeout},
      attention_(make_attention_service(environment_)),
      introspect_(make_introspect_service(environment_)),
      contexts_(make_context_service(control_)),
      server_service_(make_server_service(control_)) {}

StatusOr<std::unique_ptr<EmbeddedServer>> EmbeddedServer::start(const ServeConfig& config) {
  LONGSPAN_ASSIGN_OR_RETURN(const std::vector<v1::Method> methods, shipped_methods(config));
  LONGSPAN_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, make_backend(config.backend, {}));
  LONGSPAN_ASSIGN_OR_RETURN(std::unique_ptr<Group> group,
                            Group::start_in_process(group_options_of(config)));
  std::unique_ptr<EmbeddedServer> server(
      new EmbeddedServer(config, std::move(group), std::move(backend), methods));
  LONGSPAN_RETURN_IF_ERROR(server->expose());
  LONGSPAN_RETURN_IF_ERROR(server->listen());
  server->housekeeper_ = std::jthread(
      [raw = server.get()](const std::stop_token& stopped) { raw->keep_house(stopped); });
  return server;
}

ServerTerms EmbeddedServer::terms() const {
  return {.limits = limits_of(config_),
          .num_ranks = static_cast<int>(config_.ranks),
          .backend = backend_.get()};
}

v1::GetCapabilitiesResponse EmbeddedServer::capabilities(
    const std::vector<v1::Method>& methods) const {
  v1::GetCapabilitiesResponse message;
  message.set_server_version(LONGSPAN_VERSION);
  message.set_backend(config_.backend);
  message.set_backend_detail(backend_detail_);
  message.set_num_ranks(static_cast<uint32_t>(config_.ranks));
  const Method dense = dense_method();
  for (const DataType type : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    message.add_tensor_dtypes(encode_data_type(type));
    message.add_kv_dtypes(encode_data_type(type));
  }
  for (const int dim : {64, 80, 96, 128, 192, 256}) {
    const Problem problem{.method = &dense,
                          .num_query_heads = 1,
                          .num_kv_heads = 1,
                          .key_dim = dim,
                          .value_dim = dim,
                          .kv_dtype = DataType::kBFloat16};
    if (backend_->supports(problem).ok()) {
      message.add_head_dims(static_cast<uint32_t>(dim));
    }
  }
  message.set_page_tokens(kPageTokens);
  *message.mutable_limits() = limits_of(config_);
  message.mutable_methods()->Add(methods.begin(), methods.end());
  message.set_default_method(default_method(config_, methods));
  return message;
}

Status EmbeddedServer::expose() {
  try {
    exposer_ = std::make_unique<prometheus::Exposer>(
        absl::StrCat(config_.metrics_host, ":", config_.metrics_port), kScrapers);
  } catch (const std::exception& error) {
    return absl::UnavailableError(absl::StrCat("metrics cannot be served on ",
                                               config_.metrics_host,
                                               ":",
                                               config_.metrics_port,
                                               ": ",
                                               error.what()));
  }
  exposer_->RegisterCollectable(registry_);
  exposer_->RegisterCollectable(process_metrics_);
  return absl::OkStatus();
}

Status EmbeddedServer::listen() {
  grpc::EnableDefaultHealthCheckService(true);
  // Linked in so that reflection can describe the health service.
  LONGSPAN_CHECK(grpc::health::v1::HealthCheckRequest::descriptor() != nullptr);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();

  grpc::ResourceQuota quota("longspan");
  quota.Resize(static_cast<size_t>(config_.max_queue_bytes + kTransportBytes));
  grpc::ServerBuilder builder;
  builder.SetResourceQuota(quota);
  builder.SetMaxReceiveMessageSize(static_cast<int>(config_.max_message_bytes));
  builder.SetMaxSendMessageSize(static_cast<int>(config_.max_message_bytes));
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                             static_cast<int>(config_.max_connection_streams));
  // A peer that does not answer pings is gone; peers may ping as often as every 10 s.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
  builder.AddListeningPort(
      absl::StrCat(config_.host, ":", config_.port), grpc::InsecureServerCredentials(), &port_);
  builder.RegisterService(attention_.get());
  builder.RegisterService(introspect_.get());
  builder.RegisterService(contexts_.get());
  builder.RegisterService(server_service_.get());
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || port_ == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", config_.host, ":", config_.port));
  }
  server_->GetHealthCheckService()->SetServingStatus(kDataPlane, true);
  return absl::OkStatus();
}

void EmbeddedServer::keep_house(const std::stop_token& stopped) {
  std::mutex mutex;
  std::condition_variable_any wake;
  std::unique_lock lock(mutex);
  while (!wake.wait_for(
      lock, stopped, config_.lease_check_interval, [&] { return stopped.stop_requested(); })) {
    coordinator_.expire();
    streams_.end_stalled(std::chrono::steady_clock::now());
    worker_metrics_.set_queue_depth("decode", lead_.queue_depth(JobKind::kDecode));
    worker_metrics_.set_queue_depth("prefill", lead_.queue_depth(JobKind::kPrefill));
    worker_metrics_.set_queue_depth("append", lead_.queue_depth(JobKind::kBulk));
    worker_metrics_.set_queue_depth("control", lead_.queue_depth(JobKind::kControl));
    lead_.refresh_usage();
  }
}

void EmbeddedServer::stop() {
  if (std::exchange(stopped_, true)) {
    return;
  }
  if (housekeeper_.joinable()) {
    housekeeper_.request_stop();
    housekeeper_.join();
  }
  if (server_ != nullptr) {
    // Health last: whoever has read of it finds nothing that still takes work.
    streams_.drain();
    lead_.drain();
    server_->GetHealthCheckService()->SetServingStatus(false);
    // A step that outlasts the timeout is ended, so that its calls are answered all the same.
    std::jthread watchdog([this](const std::stop_token& done) {
      std::mutex mutex;
      std::condition_variable_any wake;
      std::unique_lock lock(mutex);
      if (!wake.wait_for(
              lock, done, config_.drain_timeout, [&done] { return done.stop_requested(); })) {
        lead_.interrupt();
      }
    });
    // Calls are refused with UNAVAILABLE until all that were taken are done; only then may gRPC
    // turn them away, which it does with CANCELLED.
    lead_.stop();
    constexpr std::chrono::seconds kLastAnswers{1};
    server_->Shutdown(std::chrono::system_clock::now() + kLastAnswers);
  }
}

// Signals that end a server. Blocked in every thread, and taken by sigwait.
sigset_t ending_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

}  // namespace

int serve(const ServeConfig& config) {
  const sigset_t signals = ending_signals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  // What cannot be parsed is answered; strangers do not get to write lines of the log.
  google::protobuf::SetLogHandler(nullptr);
  StatusOr<std::unique_ptr<EmbeddedServer>> server = EmbeddedServer::start(config);
  if (!server.ok()) {
    std::fprintf(stderr, "longspan: %s\n", std::string(server.status().message()).c_str());
    return server.status().code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
  }
  std::printf("serving on %s (metrics on %s)\n",
              (*server)->address().c_str(),
              (*server)->metrics_address().c_str());
  std::fflush(stdout);

  int signal = 0;
  sigwait(&signals, &signal);
  (*server)->log().event(spdlog::level::info,
                         absl::StrCat("signal ", signal, ": draining; another one forces the end"));
  std::thread([signals] {
    int second = 0;
    sigwait(&signals, &second);
    std::_Exit(1);
  }).detach();
  (*server)->stop();
  (*server)->log().event(spdlog::level::info, "drained");
  return 0;
}

}  // namespace longspan
