#include "client/cpp/client.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include "client/cpp/errors.h"

namespace longspan::client {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;
// A prefill chunk of this size and its answer stay well under the message limit.
constexpr int64_t kPrefillChunkBytes = int64_t{8} << 20;

std::shared_ptr<grpc::Channel> make_channel(const std::string& target) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  // The server takes pings down to 10 s apart; a dead peer is noticed within 30 s.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  // Attention is served inside a cluster: never through the web proxy of the environment.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
}

// Lets the server recognise a repeated request.
std::string new_request_id() {
  std::random_device device;
  return absl::StrCat(absl::Hex(device(), absl::kZeroPad8),
                      absl::Hex(device(), absl::kZeroPad8),
                      absl::Hex(device(), absl::kZeroPad8),
                      absl::Hex(device(), absl::kZeroPad8));
}

std::unique_ptr<grpc::ClientContext> stream_context(std::chrono::milliseconds timeout) {
  auto context = std::make_unique<grpc::ClientContext>();
  if (timeout > std::chrono::milliseconds::zero()) {
    context->set_deadline(std::chrono::system_clock::now() + timeout);
  }
  return context;
}

}  // namespace

v1::AttentionOptions with_method(const std::string& name) {
  v1::AttentionOptions options;
  options.set_method_name(name);
  return options;
}

// ---- Client ---------------------------------------------------------------------------------

Client::Client(const std::string& target, Retries retries)
    : retries_(retries),
      channel_(make_channel(target)),
      attention_(v1::AttentionService::NewStub(channel_)),
      contexts_(v1::ContextService::NewStub(channel_)),
      introspect_(v1::IntrospectService::NewStub(channel_)),
      server_(v1::ServerService::NewStub(channel_)) {}

template <typename Response, typename Stub, typename Request, typename Method>
StatusOr<Response> Client::unary(Stub& stub, Method method, const Request& request) {
  Response response;
  const Status status = retries_.call([&](grpc::ClientContext& context) {
    return from_grpc((stub.*method)(&context, request, &response));
  });
  LONGSPAN_RETURN_IF_ERROR(status);
  return response;
}

StatusOr<v1::GetCapabilitiesResponse> Client::capabilities() {
  return unary<v1::GetCapabilitiesResponse>(
      *server_, &v1::ServerService::Stub::GetCapabilities, v1::GetCapabilitiesRequest());
}

StatusOr<v1::CheckSpecResponse> Client::check_spec(const v1::ContextSpec& spec) {
  v1::CheckSpecRequest request;
  *request.mutable_spec() = spec;
  return unary<v1::CheckSpecResponse>(*server_, &v1::ServerService::Stub::CheckSpec, request);
}

StatusOr<Context> Client::create_context(const v1::ContextSpec& spec, const std::string& id) {
  v1::CreateContextRequest request;
  request.set_context_id(id);
  request.set_request_id(new_request_id());
  *request.mutable_spec() = spec;
  LONGSPAN_ASSIGN_OR_RETURN(const auto response,
                            unary<v1::CreateContextResponse>(
                                *contexts_, &v1::ContextService::Stub::CreateContext, request));
  return context(response.context().context_id());
}

StatusOr<std::vector<v1::Context>> Client::contexts() {
  std::vector<v1::Context> all;
  v1::ListContextsRequest request;
  do {
    LONGSPAN_ASSIGN_OR_RETURN(const auto response,
                              unary<v1::ListContextsResponse>(
                                  *contexts_, &v1::ContextService::Stub::ListContexts, request));
    all.insert(all.end(), response.contexts().begin(), response.contexts().end());
    request.set_page_token(response.next_page_token());
  } while (!request.page_token().empty());
  return all;
}

StatusOr<std::vector<v1::DecodeResult>> Client::decode(std::vector<v1::DecodeItem> items) {
  std::vector<v1::DecodeResult> results(items.size());
  std::vector<size_t> open(items.size());
  for (size_t index = 0; index < open.size(); ++index) {
    open[index] = index;
  }
  bool answered = false;  // every item has a result, though some may be refusals
  const Status status = retries_.call([&](grpc::ClientContext& context) -> Status {
    v1::DecodeRequest request;
    for (const size_t index : open) {
      *request.add_items() = items[index];
    }
    v1::DecodeResponse response;
    LONGSPAN_RETURN_IF_ERROR(from_grpc(attention_->Decode(&context, request, &response)));
    if (static_cast<size_t>(response.results_size()) != open.size()) {
      return absl::InternalError("the server answered another number of items than were sent");
    }
    answered = true;
    Status refused;
    std::vector<size_t> still_open;
    for (size_t place = 0; place < open.size(); ++place) {
      v1::DecodeResult& result = results[open[place]];
      result = std::move(*response.mutable_results(static_cast<int>(place)));
      if (const Status own = from_rpc(result.status()); is_retryable(own)) {
        still_open.push_back(open[place]);
        refused = own;
      }
    }
    open = std::move(still_open);
    return refused;
  });
  if (!answered) {
    return status;
  }
  return results;
}

StatusOr<std::unique_ptr<DecodeStream>> Client::decode_stream(
    std::span<const std::string> context_ids, uint32_t window) {
  return DecodeStream::open(
      *attention_, stream_context(std::chrono::milliseconds::zero()), context_ids, window);
}

StatusOr<v1::Limits> Client::limits() {
  {
    const std::lock_guard lock(mutex_);
    if (limits_) {
      return *limits_;
    }
  }
  LONGSPAN_ASSIGN_OR_RETURN(const auto answer, capabilities());
  const std::lock_guard lock(mutex_);
  limits_ = answer.limits();
  return answer.limits();
}

StatusOr<int64_t> Client::prefill_step(int64_t row_bytes) {
  const int64_t rows = std::max<int64_t>(1, kPrefillChunkBytes / std::max<int64_t>(1, row_bytes));
  LONGSPAN_ASSIGN_OR_RETURN(const v1::Limits limits, this->limits());
  return limits.max_prefill_rows() > 0 ? std::min<int64_t>(rows, limits.max_prefill_rows()) : rows;
}

// ---- Context --------------------------------------------------------------------------------

StatusOr<v1::Context> Context::info() const {
  v1::GetContextRequest request;
  request.set_context_id(id_);
  LONGSPAN_ASSIGN_OR_RETURN(
      auto response,
      client_->unary<v1::GetContextResponse>(
          *client_->contexts_, &v1::ContextService::Stub::GetContext, request));
  return std::move(*response.mutable_context());
}

StatusOr<Context> Context::fork(uint64_t num_tokens, const std::string& new_id) const {
  v1::ForkContextRequest request;
  request.set_context_id(id_);
  request.set_new_context_id(new_id);
  request.set_num_tokens(num_tokens);
  request.set_request_id(new_request_id());
  LONGSPAN_ASSIGN_OR_RETURN(
      const auto response,
      client_->unary<v1::ForkContextResponse>(
          *client_->contexts_, &v1::ContextService::Stub::ForkContext, request));
  return client_->context(response.context().context_id());
}

StatusOr<v1::Context> Context::truncate(uint64_t num_tokens, uint64_t expected_generation) const {
  v1::TruncateContextRequest request;
  request.set_context_id(id_);
  request.set_num_tokens(num_tokens);
  request.set_expected_generation(expected_generation);
  LONGSPAN_ASSIGN_OR_RETURN(
      auto response,
      client_->unary<v1::TruncateContextResponse>(
          *client_->contexts_, &v1::ContextService::Stub::TruncateContext, request));
  return std::move(*response.mutable_context());
}

Status Context::remove(bool allow_missing, uint64_t expected_generation) const {
  v1::DeleteContextRequest request;
  request.set_context_id(id_);
  request.set_allow_missing(allow_missing);
  request.set_expected_generation(expected_generation);
  return client_
      ->unary<v1::DeleteContextResponse>(
          *client_->contexts_, &v1::ContextService::Stub::DeleteContext, request)
      .status();
}

StatusOr<v1::KeepAliveResponse::Lease> Context::keep_alive() const {
  v1::KeepAliveRequest request;
  request.add_context_ids(id_);
  v1::KeepAliveResponse response;
  const Status status = client_->retries_.call([&](grpc::ClientContext& context) -> Status {
    const auto stream = client_->contexts_->KeepAlive(&context);
    stream->Write(request);
    stream->WritesDone();
    const bool answered = stream->Read(&response);
    LONGSPAN_RETURN_IF_ERROR(from_grpc(stream->Finish()));
    if (!answered || response.leases_size() != 1) {
      return absl::InternalError("the server did not answer the lease");
    }
    return from_rpc(response.leases(0).status());
  });
  LONGSPAN_RETURN_IF_ERROR(status);
  return response.leases(0);
}

StatusOr<v1::AppendResponse> Context::append(uint32_t layer,
                                             uint64_t start_pos,
                                             const Rows& key,
                                             const Rows& value,
                                             uint64_t expected_generation) const {
  v1::AppendResponse response;
  const Status status = client_->retries_.call([&](grpc::ClientContext&) -> Status {
    const auto stream = append_stream(expected_generation, client_->retries_.timeout);
    LONGSPAN_RETURN_IF_ERROR(stream->write(layer, start_pos, key, value));
    LONGSPAN_ASSIGN_OR_RETURN(response, stream->finish());
    return absl::OkStatus();
  });
  LONGSPAN_RETURN_IF_ERROR(status);
  return response;
}

std::unique_ptr<AppendStream> Context::append_stream(uint64_t expected_generation,
                                                     std::chrono::milliseconds timeout) const {
  // A server that does not tell its limits will not take the append either.
  const auto limits = client_->limits();
  const int64_t limit = limits.ok() ? static_cast<int64_t>(limits->max_chunk_bytes()) : 0;
  return std::make_unique<AppendStream>(
      *client_->attention_,
      stream_context(timeout),
      id_,
      expected_generation,
      limit > 0 ? std::min(limit, kAppendChunkBytes) : kAppendChunkBytes);
}

std::unique_ptr<PrefillStream> Context::prefill_stream(const v1::AttentionOptions& options) const {
  return std::make_unique<PrefillStream>(
      *client_->attention_, stream_context(std::chrono::milliseconds::zero()), id_, options);
}

StatusOr<std::vector<v1::PrefillResponse>> Context::prefill(
    uint32_t layer,
    uint64_t start_pos,
    const AttentionRows& rows,
    const v1::AttentionOptions& options) const {
  LONGSPAN_ASSIGN_OR_RETURN(const int64_t step, client_->prefill_step(rows.row_bytes()));
  std::vector<v1::PrefillResponse> responses;
  const Status status = client_->retries_.call([&](grpc::ClientContext&) -> Status {
    PrefillStream stream(
        *client_->attention_, stream_context(client_->retries_.timeout), id_, options);
    const auto receive = [&]() -> Status {
      LONGSPAN_ASSIGN_OR_RETURN(v1::PrefillResponse response, stream.receive());
      responses.push_back(std::move(response));
      return absl::OkStatus();
    };
    // Chunks that were answered before a refusal are not sent again. One chunk is on its way while
    // another is computed.
    const int64_t first = static_cast<int64_t>(responses.size()) * step;
    for (int64_t begin = first; begin < rows.query.num_tokens; begin += step) {
      const uint64_t position = start_pos + static_cast<uint64_t>(begin);
      LONGSPAN_RETURN_IF_ERROR(stream.send(layer, position, rows.cut(begin, begin + step)));
      if (begin > first) {
        LONGSPAN_RETURN_IF_ERROR(receive());
      }
    }
    if (first < rows.query.num_tokens) {
      LONGSPAN_RETURN_IF_ERROR(receive());
    }
    return stream.finish();
  });
  LONGSPAN_RETURN_IF_ERROR(status);
  return responses;
}

v1::DecodeItem Context::decode_item(uint32_t layer,
                                    int64_t start_pos,
                                    const AttentionRows& rows,
                                    const v1::AttentionOptions& options) const {
  v1::DecodeItem item;
  item.set_context_id(id_);
  item.set_layer(layer);
  if (start_pos >= 0) {
    item.set_start_pos(static_cast<uint64_t>(start_pos));
  }
  fill_rows(rows, item);
  *item.mutable_options() = options;
  return item;
}

StatusOr<v1::DecodeResult> Context::decode(uint32_t layer,
                                           int64_t start_pos,
                                           const AttentionRows& rows,
                                           const v1::AttentionOptions& options) const {
  std::vector<v1::DecodeItem> items;
  items.push_back(decode_item(layer, start_pos, rows, options));
  LONGSPAN_ASSIGN_OR_RETURN(auto results, client_->decode(std::move(items)));
  LONGSPAN_RETURN_IF_ERROR(from_rpc(results[0].status()));
  return std::move(results[0]);
}

StatusOr<v1::ExplainResponse> Context::explain(v1::ExplainRequest request) const {
  request.set_context_id(id_);
  return client_->unary<v1::ExplainResponse>(
      *client_->introspect_, &v1::IntrospectService::Stub::Explain, request);
}

}  // namespace longspan::client
