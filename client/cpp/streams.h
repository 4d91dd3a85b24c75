// Streams: bulk appends, chunked prefill, pipelined decode. Each belongs to one thread at a time;
// destroying one that was not finished cancels it.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <grpcpp/client_context.h>
#include <grpcpp/support/sync_stream.h>

#include "longspan/v1/attention.grpc.pb.h"

#include "base/status.h"
#include "client/cpp/tensors.h"

namespace longspan::client {

// Messages of about this size move the most bytes a second through gRPC over TCP.
inline constexpr int64_t kAppendChunkBytes = int64_t{512} << 10;

// Stores keys and values of any layers of one context. Nothing is visible before `finish` answers
// OK, and a stream that breaks leaves no trace.
class AppendStream {
 public:
  AppendStream(v1::AttentionService::Stub& stub,
               std::unique_ptr<grpc::ClientContext> context,
               const std::string& context_id,
               uint64_t expected_generation,
               int64_t chunk_bytes);
  AppendStream(const AppendStream&) = delete;
  AppendStream& operator=(const AppendStream&) = delete;
  ~AppendStream();

  // Any number of rows at positions start_pos and up; cut to chunks. An error is the stream's last.
  Status write(uint32_t layer, uint64_t start_pos, const Rows& key, const Rows& value);
  // Commits and waits until what was written is visible.
  StatusOr<v1::AppendResponse> finish();

 private:
  // Ends the call and answers its status; `response_` is set when it is OK.
  Status end();

  int64_t chunk_bytes_;
  std::unique_ptr<grpc::ClientContext> context_;
  v1::AppendResponse response_;
  std::unique_ptr<grpc::ClientWriter<v1::AppendRequest>> writer_;
  bool ended_ = false;
};

// Chunks of any layers of one context, answered in order.
class PrefillStream {
 public:
  PrefillStream(v1::AttentionService::Stub& stub,
                std::unique_ptr<grpc::ClientContext> context,
                const std::string& context_id,
                const v1::AttentionOptions& options);
  PrefillStream(const PrefillStream&) = delete;
  PrefillStream& operator=(const PrefillStream&) = delete;
  ~PrefillStream();

  // One chunk, not cut. A few may be sent before their answers are received.
  Status send(uint32_t layer, uint64_t start_pos, const AttentionRows& rows);
  // The answer to the oldest chunk without one. A chunk's own error leaves the stream usable.
  StatusOr<v1::PrefillResponse> receive();
  // Ends the stream; answers that nobody received are dropped.
  Status finish();

 private:
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::PrefillRequest, v1::PrefillResponse>> stream_;
  uint64_t last_sent_ = 0;
  uint64_t last_received_ = 0;
  bool ended_ = false;
};

// A decode session over fixed contexts. At most `window()` steps are in flight.
class DecodeStream {
 public:
  // Answers once the server has opened the session.
  static StatusOr<std::unique_ptr<DecodeStream>> open(v1::AttentionService::Stub& stub,
                                                      std::unique_ptr<grpc::ClientContext> context,
                                                      std::span<const std::string> context_ids,
                                                      uint32_t window);
  DecodeStream(const DecodeStream&) = delete;
  DecodeStream& operator=(const DecodeStream&) = delete;
  ~DecodeStream();

  uint32_t window() const { return window_; }

  // RESOURCE_EXHAUSTED when the window is full: receive first. Takes the items' contents.
  Status send(std::vector<v1::DecodeItem> items);
  // Results of the oldest step without an answer, one an item with a status of its own.
  StatusOr<std::vector<v1::DecodeResult>> receive();
  StatusOr<std::vector<v1::DecodeResult>> step(std::vector<v1::DecodeItem> items);
  Status finish();

 private:
  DecodeStream() = default;

  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::DecodeStreamRequest, v1::DecodeStreamResponse>>
      stream_;
  uint32_t window_ = 0;
  uint64_t last_sent_ = 0;
  uint64_t last_received_ = 0;
  bool ended_ = false;
};

}  // namespace longspan::client
