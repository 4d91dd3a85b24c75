#include "client/cpp/streams.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

#include "client/cpp/errors.h"

namespace longspan::client {
namespace {

Status closed_by_server() {
  return absl::InternalError("the server ended the stream without an error");
}

// Ends a bidirectional call and answers its status.
template <typename Stream>
Status end(Stream& stream, bool& ended) {
  if (std::exchange(ended, true)) {
    return absl::FailedPreconditionError("the stream has ended; open a new one");
  }
  return from_grpc(stream.Finish());
}

// The same after the server closed the stream early.
template <typename Stream>
Status failure(Stream& stream, bool& ended) {
  const Status status = end(stream, ended);
  return status.ok() ? closed_by_server() : status;
}

// Closes our side, drops answers that nobody received, and ends the call.
template <typename Response, typename Stream>
Status finish_stream(Stream& stream, bool& ended) {
  if (!ended) {
    stream.WritesDone();
    Response dropped;
    while (stream.Read(&dropped)) {
    }
  }
  return end(stream, ended);
}

template <typename Stream>
void cancel(grpc::ClientContext& context, Stream& stream, bool ended) {
  if (!ended) {
    context.TryCancel();
    stream.Finish().error_code();
  }
}

}  // namespace

// ---- Append ---------------------------------------------------------------------------------

AppendStream::AppendStream(v1::AttentionService::Stub& stub,
                           std::unique_ptr<grpc::ClientContext> context,
                           const std::string& context_id,
                           uint64_t expected_generation,
                           int64_t chunk_bytes)
    : chunk_bytes_(chunk_bytes),
      context_(std::move(context)),
      writer_(stub.Append(context_.get(), &response_)) {
  v1::AppendRequest request;
  request.mutable_header()->set_context_id(context_id);
  request.mutable_header()->set_expected_generation(expected_generation);
  // A refusal shows at the first chunk, or at finish.
  writer_->Write(request);
}

AppendStream::~AppendStream() { cancel(*context_, *writer_, ended_); }

Status AppendStream::end() { return client::end(*writer_, ended_); }

Status AppendStream::write(uint32_t layer, uint64_t start_pos, const Rows& key, const Rows& value) {
  if (key.num_tokens != value.num_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("key has ", key.num_tokens, " tokens and value ", value.num_tokens));
  }
  if (ended_) {
    return absl::FailedPreconditionError("the stream has ended; open a new one");
  }
  const int64_t row_bytes = std::max<int64_t>(1, key.row_bytes() + value.row_bytes());
  const int64_t step = std::max<int64_t>(1, chunk_bytes_ / row_bytes);
  v1::AppendRequest request;
  for (int64_t begin = 0; begin < key.num_tokens; begin += step) {
    v1::AppendRequest::Chunk& chunk = *request.mutable_chunk();
    chunk.Clear();
    chunk.set_layer(layer);
    chunk.set_start_pos(start_pos + static_cast<uint64_t>(begin));
    fill_tensor(key.cut(begin, begin + step), *chunk.mutable_key());
    fill_tensor(value.cut(begin, begin + step), *chunk.mutable_value());
    if (!writer_->Write(request)) {
      return failure(*writer_, ended_);
    }
  }
  return absl::OkStatus();
}

StatusOr<v1::AppendResponse> AppendStream::finish() {
  if (!ended_) {
    writer_->WritesDone();
  }
  LONGSPAN_RETURN_IF_ERROR(end());
  return response_;
}

// ---- Prefill --------------------------------------------------------------------------------

PrefillStream::PrefillStream(v1::AttentionService::Stub& stub,
                             std::unique_ptr<grpc::ClientContext> context,
                             const std::string& context_id,
                             const v1::AttentionOptions& options)
    : context_(std::move(context)), stream_(stub.Prefill(context_.get())) {
  v1::PrefillRequest request;
  request.mutable_header()->set_context_id(context_id);
  *request.mutable_header()->mutable_options() = options;
  stream_->Write(request);
}

PrefillStream::~PrefillStream() { cancel(*context_, *stream_, ended_); }

Status PrefillStream::send(uint32_t layer, uint64_t start_pos, const AttentionRows& rows) {
  v1::PrefillRequest request;
  v1::PrefillRequest::Chunk& chunk = *request.mutable_chunk();
  chunk.set_seq(last_sent_ + 1);
  chunk.set_layer(layer);
  chunk.set_start_pos(start_pos);
  fill_rows(rows, chunk);
  if (ended_ || !stream_->Write(request)) {
    return failure(*stream_, ended_);
  }
  ++last_sent_;
  return absl::OkStatus();
}

StatusOr<v1::PrefillResponse> PrefillStream::receive() {
  if (last_received_ == last_sent_) {
    return absl::FailedPreconditionError("every chunk that was sent has been answered");
  }
  v1::PrefillResponse response;
  if (ended_ || !stream_->Read(&response)) {
    return failure(*stream_, ended_);
  }
  ++last_received_;
  if (response.seq() != last_received_) {
    return absl::InternalError(
        absl::StrCat("the server answered chunk ", response.seq(), " instead of ", last_received_));
  }
  LONGSPAN_RETURN_IF_ERROR(from_rpc(response.status()));
  return response;
}

Status PrefillStream::finish() { return finish_stream<v1::PrefillResponse>(*stream_, ended_); }

// ---- Decode ---------------------------------------------------------------------------------

StatusOr<std::unique_ptr<DecodeStream>> DecodeStream::open(
    v1::AttentionService::Stub& stub,
    std::unique_ptr<grpc::ClientContext> context,
    std::span<const std::string> context_ids,
    uint32_t window) {
  std::unique_ptr<DecodeStream> session(new DecodeStream());
  session->context_ = std::move(context);
  session->stream_ = stub.DecodeStream(session->context_.get());
  v1::DecodeStreamRequest request;
  request.mutable_open()->set_window(window);
  for (const std::string& id : context_ids) {
    request.mutable_open()->add_context_ids(id);
  }
  session->stream_->Write(request);
  v1::DecodeStreamResponse response;
  if (!session->stream_->Read(&response)) {
    return failure(*session->stream_, session->ended_);
  }
  session->window_ = response.opened().window();
  return session;
}

DecodeStream::~DecodeStream() {
  if (stream_ != nullptr) {
    cancel(*context_, *stream_, ended_);
  }
}

Status DecodeStream::send(std::vector<v1::DecodeItem> items) {
  if (window_ > 0 && last_sent_ - last_received_ >= window_) {
    return absl::ResourceExhaustedError(
        absl::StrCat(window_, " steps are in flight, the most; receive one first"));
  }
  v1::DecodeStreamRequest request;
  request.mutable_step()->set_seq(last_sent_ + 1);
  for (v1::DecodeItem& item : items) {
    *request.mutable_step()->add_items() = std::move(item);
  }
  if (ended_ || !stream_->Write(request)) {
    return failure(*stream_, ended_);
  }
  ++last_sent_;
  return absl::OkStatus();
}

StatusOr<std::vector<v1::DecodeResult>> DecodeStream::receive() {
  if (last_received_ == last_sent_) {
    return absl::FailedPreconditionError("every step that was sent has been answered");
  }
  v1::DecodeStreamResponse response;
  if (ended_ || !stream_->Read(&response)) {
    return failure(*stream_, ended_);
  }
  ++last_received_;
  v1::DecodeStreamResponse::StepResult& result = *response.mutable_result();
  if (result.seq() != last_received_) {
    return absl::InternalError(
        absl::StrCat("the server answered step ", result.seq(), " instead of ", last_received_));
  }
  LONGSPAN_RETURN_IF_ERROR(from_rpc(result.status()));
  std::vector<v1::DecodeResult> results;
  results.reserve(static_cast<size_t>(result.results_size()));
  for (v1::DecodeResult& item : *result.mutable_results()) {
    results.push_back(std::move(item));
  }
  return results;
}

StatusOr<std::vector<v1::DecodeResult>> DecodeStream::step(std::vector<v1::DecodeItem> items) {
  LONGSPAN_RETURN_IF_ERROR(send(std::move(items)));
  return receive();
}

Status DecodeStream::finish() { return finish_stream<v1::DecodeStreamResponse>(*stream_, ended_); }

}  // namespace longspan::client
