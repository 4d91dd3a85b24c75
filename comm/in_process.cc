#include "comm/in_process.h"

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longspan {
namespace {

// Sends up to this size are copied when posted, so that the sender need not wait for its readers.
constexpr size_t kEagerBytes = size_t{16} << 10;
// Looks at the arrival counter before a rank sleeps, where every rank can have a core: about 20 us,
// what a wake-up costs.
constexpr int kSpins = 400;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

enum class Operation : uint8_t { kSendReceive, kAllGather, kAllToAll, kBroadcast, kBarrier };

const char* to_string(Operation operation) {
  switch (operation) {
    case Operation::kSendReceive:
      return "send_receive";
    case Operation::kAllGather:
      return "all_gather";
    case Operation::kAllToAll:
      return "all_to_all";
    case Operation::kBroadcast:
      return "broadcast";
    case Operation::kBarrier:
      return "barrier";
  }
  return "?";
}

// What a rank wants of one operation, for its peers to read.
struct Post {
  Operation operation = Operation::kBarrier;
  std::span<const std::byte> send;       // the rank's buffer, or `eager`
  std::vector<int64_t> send_sizes;       // all_to_all
  std::vector<int64_t> receive_sizes;    // all_to_all
  std::vector<int64_t> send_offsets;     // all_to_all
  std::vector<int64_t> receive_offsets;  // all_to_all
  size_t receive_bytes = 0;
  int destination = 0;  // send_receive
  int source = 0;       // send_receive, and broadcast's root
  bool direct = false;  // peers read the rank's own buffer
  std::vector<std::byte> eager;
};

std::vector<int64_t> offsets_of(std::span<const int64_t> sizes) {
  std::vector<int64_t> offsets(sizes.size() + 1, 0);
  std::partial_sum(sizes.begin(), sizes.end(), offsets.begin() + 1);
  return offsets;
}

// INVALID_ARGUMENT with the first disagreement among the posts of one operation. Every rank
// computes the same answer.
Status check_all_to_all(std::span<const Post> posts) {
  const size_t size = posts.size();
  for (size_t rank = 0; rank < size; ++rank) {
    const Post& post = posts[rank];
    if (post.send_sizes.size() != size || post.receive_sizes.size() != size) {
      return absl::InvalidArgumentError(
          absl::StrCat("all_to_all: rank ", rank, " gave sizes for another number of ranks"));
    }
    for (size_t peer = 0; peer < size; ++peer) {
      if (post.send_sizes[peer] < 0 || post.receive_sizes[peer] < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("all_to_all: rank ", rank, " gave a negative size"));
      }
    }
    if (post.send_offsets.back() != static_cast<int64_t>(post.send.size()) ||
        post.receive_offsets.back() != static_cast<int64_t>(post.receive_bytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat("all_to_all: the sizes of rank ", rank, " do not add up to its buffers"));
    }
  }
  for (size_t from = 0; from < size; ++from) {
    for (size_t to = 0; to < size; ++to) {
      if (posts[from].send_sizes[to] != posts[to].receive_sizes[from]) {
        return absl::InvalidArgumentError(absl::StrCat("all_to_all: rank ",
                                                       from,
                                                       " sends ",
                                                       posts[from].send_sizes[to],
                                                       " bytes to rank ",
                                                       to,
                                                       ", which expects ",
                                                       posts[to].receive_sizes[from]));
      }
    }
  }
  return absl::OkStatus();
}

Status check_send_receive(std::span<const Post> posts) {
  const int size = static_cast<int>(posts.size());
  for (int rank = 0; rank < size; ++rank) {
    const Post& post = posts[static_cast<size_t>(rank)];
    if (post.destination < 0 || post.destination >= size || post.source < 0 ||
        post.source >= size) {
      return absl::InvalidArgumentError(
          absl::StrCat("send_receive: rank ", rank, " names a peer that does not exist"));
    }
  }
  for (int rank = 0; rank < size; ++rank) {
    const Post& post = posts[static_cast<size_t>(rank)];
    const Post& peer = posts[static_cast<size_t>(post.destination)];
    if (peer.source != rank || peer.receive_bytes != post.send.size()) {
      return absl::InvalidArgumentError(absl::StrCat("send_receive: rank ",
                                                     rank,
                                                     " sends ",
                                                     post.send.size(),
                                                     " bytes to rank ",
                                                     post.destination,
                                                     ", which expects ",
                                                     peer.receive_bytes,
                                                     " from rank ",
                                                     peer.source));
    }
  }
  return absl::OkStatus();
}

Status check_agreement(std::span<const Post> posts) {
  const Operation operation = posts[0].operation;
  const size_t bytes = posts[0].send.size();
  for (size_t rank = 0; rank < posts.size(); ++rank) {
    const Post& post = posts[rank];
    if (post.operation != operation) {
      return absl::InvalidArgumentError(absl::StrCat("rank 0 called ",
                                                     to_string(operation),
                                                     " and rank ",
                                                     rank,
                                                     " called ",
                                                     to_string(post.operation)));
    }
    if (operation == Operation::kAllGather &&
        (post.send.size() != bytes || post.receive_bytes != bytes * posts.size())) {
      return absl::InvalidArgumentError(
          absl::StrCat("all_gather: rank ", rank, " has buffers of another size"));
    }
    if (operation == Operation::kBroadcast && (post.source != posts[0].source || post.source < 0 ||
                                               post.source >= static_cast<int>(posts.size()) ||
                                               post.receive_bytes != posts[0].receive_bytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat("broadcast: rank ", rank, " has another root or size"));
    }
  }
  if (operation == Operation::kAllToAll) {
    return check_all_to_all(posts);
  }
  return operation == Operation::kSendReceive ? check_send_receive(posts) : absl::OkStatus();
}

// Where the ranks meet. An operation: every rank posts and arrives; when all have, each checks the
// posts and copies what is for it. A rank whose own buffer is read (a direct post) stays until all
// have copied. Nobody is more than one operation ahead, so two sets of posts are enough.
class Hub {
 public:
  Hub(int size, bool spin) : size_(size), spin_(spin) {
    for (std::vector<Post>& posts : posts_) {
      posts.resize(static_cast<size_t>(size));
    }
  }

  int size() const { return size_; }

  Post& own_post(int rank, int64_t operation) {
    return posts_[static_cast<size_t>(operation % 2)][static_cast<size_t>(rank)];
  }
  std::span<const Post> posts(int64_t operation) const {
    return posts_[static_cast<size_t>(operation % 2)];
  }

  // The failure of an earlier operation: then the posts may be in use still and are left alone.
  Status failure() {
    if (!failed_.load()) {
      return absl::OkStatus();
    }
    std::unique_lock lock(mutex_);
    return failure_;
  }

  // Peers may read the rank's post from here on. OK: all have arrived, every post can be read until
  // this rank leaves. A failure keeps later ranks from arriving, so that an operation either has
  // everybody or reads nobody.
  Status arrive(int64_t operation, Communicator::Deadline deadline) {
    const int64_t all = (operation + 1) * size_;
    std::unique_lock lock(mutex_);
    if (!failure_.ok()) {
      return failure_;
    }
    if (arrived_.fetch_add(1) + 1 == all) {
      wake_.notify_all();
      return absl::OkStatus();
    }
    spin_until(lock, all);
    const auto ready = [&] { return arrived_.load() >= all || !failure_.ok(); };
    if (!wake_.wait_until(lock, deadline, ready)) {
      return fail_locked(absl::DeadlineExceededError("a collective passed its deadline"));
    }
    return arrived_.load() >= all ? absl::OkStatus() : failure_;
  }

  // Ends the reading of posts. The owner of a `direct` post waits for the others, for no longer
  // than their copies take.
  void leave(int64_t operation, bool direct) {
    const int64_t all = (operation + 1) * size_;
    std::unique_lock lock(mutex_);
    if (++copied_ == all) {
      wake_.notify_all();
    }
    if (direct) {
      wake_.wait(lock, [&] { return copied_ >= all; });
    }
  }

  // The first failure stays.
  Status fail(Status failure) {
    std::unique_lock lock(mutex_);
    return fail_locked(std::move(failure));
  }

 private:
  Status fail_locked(Status failure) {
    if (failure_.ok()) {
      failure_ = std::move(failure);
      failed_.store(true);
      wake_.notify_all();
    }
    return failure_;
  }

  void spin_until(std::unique_lock<std::mutex>& lock, int64_t all) {
    if (!spin_) {
      return;
    }
    lock.unlock();
    for (int i = 0; i < kSpins && arrived_.load() < all && !failed_.load(); ++i) {
      relax();
    }
    lock.lock();
  }

  const int size_;
  const bool spin_;
  std::array<std::vector<Post>, 2> posts_;  // written by their rank before it arrives

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int64_t> arrived_{0};  // over all operations; written under mutex_, spun on without
  std::atomic<bool> failed_{false};  // mirrors failure_, for the same
  int64_t copied_ = 0;               // guarded by mutex_, as is the next
  Status failure_;
};

class InProcessCommunicator final : public Communicator {
 public:
  InProcessCommunicator(std::shared_ptr<Hub> hub, int rank, InProcessOptions options)
      : hub_(std::move(hub)), rank_(rank), options_(std::move(options)) {}
  InProcessCommunicator(const InProcessCommunicator&) = delete;
  InProcessCommunicator& operator=(const InProcessCommunicator&) = delete;
  ~InProcessCommunicator() override {
    (void)hub_->fail(absl::UnavailableError(absl::StrCat("rank ", rank_, " has left")));
  }

  std::string_view name() const override { return "in_process"; }
  int rank() const override { return rank_; }
  int size() const override { return hub_->size(); }
  int64_t epoch() const override { return options_.epoch; }
  CommunicatorCapabilities capabilities() const override {
    return {.device_memory = false, .survives_peer_loss = true};
  }

  Status send_receive(std::span<const std::byte> send,
                      int destination,
                      std::span<std::byte> receive,
                      int source,
                      Deadline deadline) override {
    LONGSPAN_RETURN_IF_ERROR(start(Operation::kSendReceive, send, receive.size()));
    post().destination = destination;
    post().source = source;
    return run(deadline, [&](std::span<const Post> posts) {
      copy(receive, posts[static_cast<size_t>(source)].send, source);
      count_sent(send.size(), destination);
    });
  }

  Status all_gather(std::span<const std::byte> send,
                    std::span<std::byte> receive,
                    Deadline deadline) override {
    LONGSPAN_RETURN_IF_ERROR(start(Operation::kAllGather, send, receive.size()));
    return run(deadline, [&](std::span<const Post> posts) {
      for (int peer = 0; peer < size(); ++peer) {
        copy(receive.subspan(static_cast<size_t>(peer) * send.size(), send.size()),
             posts[static_cast<size_t>(peer)].send,
             peer);
        count_sent(send.size(), peer);
      }
    });
  }

  Status all_to_all(std::span<const std::byte> send,
                    std::span<const int64_t> send_sizes,
                    std::span<std::byte> receive,
                    std::span<const int64_t> receive_sizes,
                    Deadline deadline) override {
    LONGSPAN_RETURN_IF_ERROR(start(Operation::kAllToAll, send, receive.size()));
    post().send_sizes.assign(send_sizes.begin(), send_sizes.end());
    post().receive_sizes.assign(receive_sizes.begin(), receive_sizes.end());
    post().send_offsets = offsets_of(send_sizes);
    post().receive_offsets = offsets_of(receive_sizes);
    return run(deadline, [&](std::span<const Post> posts) {
      const auto own_index = static_cast<size_t>(rank_);
      const Post& own = posts[own_index];
      for (int peer = 0; peer < size(); ++peer) {
        const auto index = static_cast<size_t>(peer);
        const Post& from = posts[index];
        const auto bytes = static_cast<size_t>(own.receive_sizes[index]);
        copy(receive.subspan(static_cast<size_t>(own.receive_offsets[index]), bytes),
             from.send.subspan(static_cast<size_t>(from.send_offsets[own_index]), bytes),
             peer);
        count_sent(static_cast<size_t>(own.send_sizes[index]), peer);
      }
    });
  }

  Status broadcast(std::span<std::byte> data, int root, Deadline deadline) override {
    const bool is_root = root == rank_;
    LONGSPAN_RETURN_IF_ERROR(
        start(Operation::kBroadcast, is_root ? data : std::span<std::byte>(), data.size()));
    post().source = root;
    return run(deadline, [&](std::span<const Post> posts) {
      if (!is_root) {
        copy(data, posts[static_cast<size_t>(root)].send, root);
      } else {
        bytes_sent_ += static_cast<int64_t>(data.size()) * (size() - 1);
      }
    });
  }

  Status barrier(Deadline deadline) override {
    LONGSPAN_RETURN_IF_ERROR(start(Operation::kBarrier, {}, 0));
    return run(deadline, [](std::span<const Post>) {});
  }

  void abort(Status reason) override {
    (void)hub_->fail(absl::AbortedError(absl::StrCat("aborted: ", reason.message())));
  }
  int64_t bytes_sent() const override { return bytes_sent_; }
  int64_t bytes_received() const override { return bytes_received_; }

 private:
  Post& post() { return hub_->own_post(rank_, next_operation_); }

  Status start(Operation operation, std::span<const std::byte> send, size_t receive_bytes) {
    LONGSPAN_RETURN_IF_ERROR(hub_->failure());
    if (options_.before_operation) {
      Status injected = options_.before_operation(rank_, to_string(operation));
      if (!injected.ok()) {
        return hub_->fail(std::move(injected));
      }
    }
    post().operation = operation;
    post().receive_bytes = receive_bytes;
    post().direct = send.size() > kEagerBytes;
    if (post().direct) {
      post().send = send;
    } else {
      post().eager.assign(send.begin(), send.end());
      post().send = post().eager;
    }
    return absl::OkStatus();
  }

  template <typename Copy>
  Status run(Deadline deadline, Copy copy_own) {
    const int64_t operation = next_operation_;
    LONGSPAN_RETURN_IF_ERROR(hub_->arrive(operation, deadline));
    ++next_operation_;
    const std::span<const Post> posts = hub_->posts(operation);
    Status agreement = check_agreement(posts);
    if (agreement.ok()) {
      copy_own(posts);
    }
    hub_->leave(operation, posts[static_cast<size_t>(rank_)].direct);
    return agreement.ok() ? absl::OkStatus() : hub_->fail(std::move(agreement));
  }

  void copy(std::span<std::byte> to, std::span<const std::byte> from, int peer) {
    if (!from.empty() && to.data() != from.data()) {
      std::memcpy(to.data(), from.data(), from.size());
    }
    if (peer != rank_) {
      bytes_received_ += static_cast<int64_t>(from.size());
    }
  }

  void count_sent(size_t bytes, int peer) {
    if (peer != rank_) {
      bytes_sent_ += static_cast<int64_t>(bytes);
    }
  }

  const std::shared_ptr<Hub> hub_;
  const int rank_;
  const InProcessOptions options_;
  int64_t next_operation_ = 0;
  // Read by other threads, for metrics.
  std::atomic<int64_t> bytes_sent_{0};
  std::atomic<int64_t> bytes_received_{0};
};

}  // namespace

StatusOr<std::vector<std::unique_ptr<Communicator>>> make_in_process_group(
    int size, const InProcessOptions& options) {
  if (size < 1) {
    return absl::InvalidArgumentError(absl::StrCat("size: must be at least 1, got ", size));
  }
  const bool spin = size > 1 && static_cast<unsigned>(size) <= std::thread::hardware_concurrency();
  auto hub = std::make_shared<Hub>(size, spin);
  std::vector<std::unique_ptr<Communicator>> communicators;
  communicators.reserve(static_cast<size_t>(size));
  for (int rank = 0; rank < size; ++rank) {
    communicators.push_back(std::make_unique<InProcessCommunicator>(hub, rank, options));
  }
  return communicators;
}

}  // namespace longspan
