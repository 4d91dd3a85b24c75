// A connection to a Longspan server, and handles on the contexts that it holds.
//
// Thread-safe, apart from the streams. Calls that the server refuses for a while are repeated; the
// messages of longspan.v1 are the types.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <grpcpp/channel.h>

#include "longspan/v1/attention.grpc.pb.h"
#include "longspan/v1/context.grpc.pb.h"
#include "longspan/v1/introspect.grpc.pb.h"
#include "longspan/v1/server.grpc.pb.h"

#include "base/status.h"
#include "client/cpp/retries.h"
#include "client/cpp/streams.h"
#include "client/cpp/tensors.h"

namespace longspan::client {

class Client;

// Options of AttentionOptions with a method of the context by name; empty: its default.
v1::AttentionOptions with_method(const std::string& name);

// A handle, cheap to copy. Borrows the client, and is valid as long as the server holds the
// context.
class Context {
 public:
  Context(Client& client, std::string id) : client_(&client), id_(std::move(id)) {}

  const std::string& id() const { return id_; }

  StatusOr<v1::Context> info() const;
  // A new context that shares the first `num_tokens` copy-on-write. Empty id: the server's choice.
  StatusOr<Context> fork(uint64_t num_tokens, const std::string& new_id = "") const;
  // Keeps tokens [0, num_tokens) of every layer. Generation 0: any.
  StatusOr<v1::Context> truncate(uint64_t num_tokens, uint64_t expected_generation = 0) const;
  Status remove(bool allow_missing = false, uint64_t expected_generation = 0) const;
  // Renews the lease.
  StatusOr<v1::KeepAliveResponse::Lease> keep_alive() const;

  // Stores tokens of one layer, all or nothing.
  StatusOr<v1::AppendResponse> append(uint32_t layer,
                                      uint64_t start_pos,
                                      const Rows& key,
                                      const Rows& value,
                                      uint64_t expected_generation = 0) const;
  // For bulk. Zero timeout: no limit.
  std::unique_ptr<AppendStream> append_stream(
      uint64_t expected_generation = 0,
      std::chrono::milliseconds timeout = std::chrono::hours(1)) const;

  // Attention of many rows at start_pos and up, each over the tokens up to its own, after storing
  // keys and values if given. Cut to chunks; one response a chunk, in order.
  StatusOr<std::vector<v1::PrefillResponse>> prefill(
      uint32_t layer,
      uint64_t start_pos,
      const AttentionRows& rows,
      const v1::AttentionOptions& options = {}) const;
  std::unique_ptr<PrefillStream> prefill_stream(const v1::AttentionOptions& options = {}) const;

  // An item of a batched decode of this context. Negative position: the layer's last tokens.
  v1::DecodeItem decode_item(uint32_t layer,
                             int64_t start_pos,
                             const AttentionRows& rows,
                             const v1::AttentionOptions& options = {}) const;
  StatusOr<v1::DecodeResult> decode(uint32_t layer,
                                    int64_t start_pos,
                                    const AttentionRows& rows,
                                    const v1::AttentionOptions& options = {}) const;

  // The request's context id is filled in.
  StatusOr<v1::ExplainResponse> explain(v1::ExplainRequest request) const;

 private:
  Client* client_;
  std::string id_;
};

class Client {
 public:
  // host:port. Connects at the first call.
  explicit Client(const std::string& target, Retries retries = {});

  StatusOr<v1::GetCapabilitiesResponse> capabilities();
  // Every reason why a context of this spec would be refused.
  StatusOr<v1::CheckSpecResponse> check_spec(const v1::ContextSpec& spec);

  // With an id the call finds the existing context when the spec is equal. Empty: the server's
  // choice.
  StatusOr<Context> create_context(const v1::ContextSpec& spec, const std::string& id = "");
  // A handle on a context that exists already; asks the server nothing.
  Context context(std::string id) { return {*this, std::move(id)}; }
  // All pages.
  StatusOr<std::vector<v1::Context>> contexts();

  // Any number of contexts, one layer each. One result an item, each with a status of its own;
  // items that the server refuses for a while are repeated.
  StatusOr<std::vector<v1::DecodeResult>> decode(std::vector<v1::DecodeItem> items);
  // A session over these contexts; at most `window` steps in flight, 0: the server's limit.
  StatusOr<std::unique_ptr<DecodeStream>> decode_stream(std::span<const std::string> context_ids,
                                                        uint32_t window = 0);

 private:
  friend class Context;

  // One unary call under the retries.
  template <typename Response, typename Stub, typename Request, typename Method>
  StatusOr<Response> unary(Stub& stub, Method method, const Request& request);
  // The server's limits, asked for once.
  StatusOr<v1::Limits> limits();
  // Rows of a prefill chunk: within the server's limit, and small beside the message limit.
  StatusOr<int64_t> prefill_step(int64_t row_bytes);

  Retries retries_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::AttentionService::Stub> attention_;
  std::unique_ptr<v1::ContextService::Stub> contexts_;
  std::unique_ptr<v1::IntrospectService::Stub> introspect_;
  std::unique_ptr<v1::ServerService::Stub> server_;
  std::mutex mutex_;
  std::optional<v1::Limits> limits_;  // guarded by mutex_
};

}  // namespace longspan::client
