// Collectives among the ranks of a group, over bytes: this folder knows nothing of attention.
//
// All ranks call the same operations in the same order. Every call has a deadline. A communicator
// that failed stays failed: each later call returns the first error, and the group makes a new one
// under the next epoch. `abort` may be called from any thread and makes every rank's pending and
// later calls return ABORTED.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/status.h"

namespace longspan {

struct CommunicatorCapabilities {
  bool device_memory = false;
  // Peer loss is an error of the call (gloo, nccl, in_process) rather than the end of the process
  // (mpi).
  bool survives_peer_loss = false;
};

class Communicator {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  virtual ~Communicator() = default;

  virtual std::string_view name() const = 0;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual int64_t epoch() const = 0;
  virtual CommunicatorCapabilities capabilities() const = 0;

  // One ring step: sends to `destination` while receiving from `source`; sizes may be zero and must
  // agree pairwise.
  virtual Status send_receive(std::span<const std::byte> send,
                              int destination,
                              std::span<std::byte> receive,
                              int source,
                              Deadline deadline) = 0;
  // receive = concatenation of every rank's `send`, all of one size; receive.size() == size() *
  // send.size().
  virtual Status all_gather(std::span<const std::byte> send,
                            std::span<std::byte> receive,
                            Deadline deadline) = 0;
  // Variable sizes, in bytes: send_sizes[r] bytes go to rank r, receive_sizes[r] come from it; both
  // buffers are the concatenations in rank order. receive_sizes must equal what the peers send:
  // INVALID_ARGUMENT otherwise.
  virtual Status all_to_all(std::span<const std::byte> send,
                            std::span<const int64_t> send_sizes,
                            std::span<std::byte> receive,
                            std::span<const int64_t> receive_sizes,
                            Deadline deadline) = 0;
  // `data` of `root` to every rank; the same size everywhere.
  virtual Status broadcast(std::span<std::byte> data, int root, Deadline deadline) = 0;
  virtual Status barrier(Deadline deadline) = 0;

  virtual void abort(Status reason) = 0;
  // Bytes that this rank has sent and received since it was made, for metrics.
  virtual int64_t bytes_sent() const = 0;
  virtual int64_t bytes_received() const = 0;
};

}  // namespace longspan
