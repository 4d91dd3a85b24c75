// What every communicator must do, at every group size: the pipeline relies on nothing else.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <numeric>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm/in_process.h"

namespace longspan {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

Communicator::Deadline soon() { return steady_clock::now() + seconds(60); }

// Every byte tells its sender, its receiver and its place.
std::byte pattern(int from, int to, size_t index) {
  return static_cast<std::byte>(
      (static_cast<size_t>(from) * 31 + static_cast<size_t>(to) * 7 + index * 13 + index / 251) &
      0xff);
}

std::vector<std::byte> filled(int from, int to, size_t size) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) {
    bytes[i] = pattern(from, to, i);
  }
  return bytes;
}

const std::byte kPoison{0xa5};

template <typename Body>
std::vector<Status> run_ranks(std::vector<std::unique_ptr<Communicator>>& ranks, Body body) {
  std::vector<Status> statuses(ranks.size());
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    threads.emplace_back([&, rank] { statuses[rank] = body(*ranks[rank]); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return statuses;
}

std::vector<std::unique_ptr<Communicator>> make_group(int size,
                                                      const InProcessOptions& options = {}) {
  auto group = make_in_process_group(size, options);
  EXPECT_TRUE(group.ok()) << group.status();
  return *std::move(group);
}

void expect_all_ok(const std::vector<Status>& statuses) {
  for (const Status& status : statuses) {
    EXPECT_TRUE(status.ok()) << status;
  }
}

void expect_all(const std::vector<Status>& statuses, absl::StatusCode code) {
  for (const Status& status : statuses) {
    EXPECT_EQ(status.code(), code) << status;
  }
}

class Conformance : public testing::TestWithParam<int> {
 protected:
  int size() const { return GetParam(); }
};

Status exchange_all(Communicator& comm, size_t bytes) {
  const int size = comm.size();
  const int rank = comm.rank();
  std::vector<std::byte> gathered(bytes * static_cast<size_t>(size), kPoison);
  LONGSPAN_RETURN_IF_ERROR(comm.all_gather(filled(rank, 0, bytes), gathered, soon()));
  for (int peer = 0; peer < size; ++peer) {
    const std::vector<std::byte> expected = filled(peer, 0, bytes);
    const auto part = gathered.begin() + static_cast<std::ptrdiff_t>(bytes) * peer;
    if (!std::equal(expected.begin(), expected.end(), part)) {
      return absl::DataLossError("all_gather");
    }
  }
  std::vector<std::byte> message =
      rank == size - 1 ? filled(size - 1, 5, bytes) : std::vector<std::byte>(bytes, kPoison);
  LONGSPAN_RETURN_IF_ERROR(comm.broadcast(message, size - 1, soon()));
  if (message != filled(size - 1, 5, bytes)) {
    return absl::DataLossError("broadcast");
  }
  const int next = (rank + 1) % size;
  const int previous = (rank + size - 1) % size;
  std::vector<std::byte> received(bytes, kPoison);
  LONGSPAN_RETURN_IF_ERROR(
      comm.send_receive(filled(rank, next, bytes), next, received, previous, soon()));
  if (received != filled(previous, rank, bytes)) {
    return absl::DataLossError("send_receive");
  }
  return comm.barrier(soon());
}

TEST_P(Conformance, MovesEveryByteAtEverySize) {
  auto ranks = make_group(size());
  for (const size_t bytes :
       {size_t{0}, size_t{1}, size_t{63}, size_t{16384}, size_t{16385}, size_t{1} << 20}) {
    expect_all_ok(run_ranks(ranks, [&](Communicator& comm) { return exchange_all(comm, bytes); }));
  }
}

TEST_P(Conformance, BroadcastsSixtyFourMebibytes) {
  auto ranks = make_group(size());
  const std::vector<std::byte> expected = filled(0, 0, size_t{64} << 20);
  expect_all_ok(run_ranks(ranks, [&](Communicator& comm) -> Status {
    std::vector<std::byte> data =
        comm.rank() == 0 ? expected : std::vector<std::byte>(expected.size(), kPoison);
    LONGSPAN_RETURN_IF_ERROR(comm.broadcast(data, 0, soon()));
    return data == expected ? absl::OkStatus() : absl::DataLossError("broadcast");
  }));
  for (const auto& comm : ranks) {
    const auto total = static_cast<int64_t>(expected.size());
    EXPECT_EQ(comm->bytes_sent(), comm->rank() == 0 ? total * (size() - 1) : 0);
    EXPECT_EQ(comm->bytes_received(), comm->rank() == 0 ? 0 : total);
  }
}

// Bytes from `from` to `to`: zero for some pairs, large enough for direct copies for others.
size_t pair_bytes(int from, int to, int round) {
  const size_t kind = static_cast<size_t>(from * 5 + to * 3 + round) % 4;
  return kind == 0 ? 0 : kind * kind * kind * 1111;
}

Status exchange_pairs(Communicator& comm, int round) {
  const int rank = comm.rank();
  std::vector<std::byte> send;
  std::vector<std::byte> expected;
  std::vector<int64_t> send_sizes;
  std::vector<int64_t> receive_sizes;
  for (int peer = 0; peer < comm.size(); ++peer) {
    const auto out = filled(rank, peer, pair_bytes(rank, peer, round));
    send.insert(send.end(), out.begin(), out.end());
    send_sizes.push_back(static_cast<int64_t>(out.size()));
    const auto in = filled(peer, rank, pair_bytes(peer, rank, round));
    expected.insert(expected.end(), in.begin(), in.end());
    receive_sizes.push_back(static_cast<int64_t>(in.size()));
  }
  std::vector<std::byte> received(expected.size(), kPoison);
  LONGSPAN_RETURN_IF_ERROR(comm.all_to_all(send, send_sizes, received, receive_sizes, soon()));
  return received == expected ? absl::OkStatus() : absl::DataLossError("all_to_all");
}

TEST_P(Conformance, AllToAllTakesVariableSizesManyTimes) {
  auto ranks = make_group(size());
  expect_all_ok(run_ranks(ranks, [&](Communicator& comm) -> Status {
    for (int round = 0; round < 50; ++round) {
      LONGSPAN_RETURN_IF_ERROR(exchange_pairs(comm, round));
    }
    return absl::OkStatus();
  }));
}

TEST_P(Conformance, DisagreementIsInvalidOnEveryRankAndStays) {
  if (size() == 1) {
    GTEST_SKIP() << "one rank agrees with itself";
  }
  auto ranks = make_group(size());
  expect_all(run_ranks(ranks,
                       [&](Communicator& comm) {
                         const size_t bytes = comm.rank() == size() - 1 ? 9 : 8;
                         std::vector<std::byte> send(bytes);
                         std::vector<std::byte> receive(bytes * static_cast<size_t>(size()));
                         return comm.all_gather(send, receive, soon());
                       }),
             absl::StatusCode::kInvalidArgument);
  expect_all(run_ranks(ranks, [&](Communicator& comm) { return comm.barrier(soon()); }),
             absl::StatusCode::kInvalidArgument);
}

TEST_P(Conformance, AllToAllSizesMustMatchThePeers) {
  if (size() == 1) {
    GTEST_SKIP() << "one rank agrees with itself";
  }
  auto ranks = make_group(size());
  expect_all(run_ranks(ranks,
                       [&](Communicator& comm) {
                         const auto peers = static_cast<size_t>(size());
                         const int64_t expects = comm.rank() == 0 ? 3 : 4;
                         std::vector<std::byte> send(4 * peers);
                         std::vector<int64_t> sizes(peers, 4);
                         std::vector<int64_t> expected(peers, expects);
                         std::vector<std::byte> receive(static_cast<size_t>(expects) * peers);
                         return comm.all_to_all(send, sizes, receive, expected, soon());
                       }),
             absl::StatusCode::kInvalidArgument);
}

TEST_P(Conformance, DifferentOperationsAreInvalid) {
  if (size() == 1) {
    GTEST_SKIP() << "one rank agrees with itself";
  }
  auto ranks = make_group(size());
  expect_all(run_ranks(ranks,
                       [&](Communicator& comm) {
                         std::vector<std::byte> data(4);
                         return comm.rank() == 0 ? comm.barrier(soon())
                                                 : comm.broadcast(data, 0, soon());
                       }),
             absl::StatusCode::kInvalidArgument);
}

TEST_P(Conformance, AMissingRankIsADeadlineForAll) {
  if (size() == 1) {
    GTEST_SKIP() << "nobody is missing";
  }
  auto ranks = make_group(size());
  expect_all(run_ranks(ranks,
                       [&](Communicator& comm) -> Status {
                         if (comm.rank() != 0) {
                           return comm.barrier(steady_clock::now() + milliseconds(20));
                         }
                         return absl::DeadlineExceededError("stays away");
                       }),
             absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(ranks[0]->barrier(soon()).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_P(Conformance, AbortFromAnotherThreadEndsPendingAndLaterCalls) {
  if (size() == 1) {
    GTEST_SKIP() << "nothing pends";
  }
  auto ranks = make_group(size());
  expect_all(run_ranks(ranks,
                       [&](Communicator& comm) {
                         if (comm.rank() == 0) {
                           comm.abort(absl::UnavailableError("the test says so"));
                         }
                         return comm.barrier(soon());
                       }),
             absl::StatusCode::kAborted);
}

TEST_P(Conformance, ALostRankFailsEveryRank) {
  std::atomic<int> calls{0};
  InProcessOptions options;
  options.before_operation = [&](int rank, std::string_view operation) -> Status {
    EXPECT_EQ(operation, "all_gather");
    return rank == size() - 1 && ++calls == 3 ? absl::UnavailableError("lost") : absl::OkStatus();
  };
  auto ranks = make_group(size(), options);
  expect_all(run_ranks(ranks,
                       [&](Communicator& comm) -> Status {
                         std::vector<std::byte> send(100000);
                         std::vector<std::byte> receive(send.size() * static_cast<size_t>(size()));
                         for (int i = 0; i < 5; ++i) {
                           LONGSPAN_RETURN_IF_ERROR(comm.all_gather(send, receive, soon()));
                         }
                         return absl::OkStatus();
                       }),
             absl::StatusCode::kUnavailable);
}

TEST_P(Conformance, ASlowRankIsWaitedFor) {
  InProcessOptions options;
  options.before_operation = [&](int rank, std::string_view) -> Status {
    if (rank == size() - 1) {
      std::this_thread::sleep_for(milliseconds(5));
    }
    return absl::OkStatus();
  };
  auto ranks = make_group(size(), options);
  expect_all_ok(run_ranks(ranks, [&](Communicator& comm) { return exchange_pairs(comm, 1); }));
}

TEST_P(Conformance, ADestroyedRankIsUnavailable) {
  if (size() == 1) {
    GTEST_SKIP() << "nobody is left";
  }
  auto ranks = make_group(size());
  ranks.pop_back();
  expect_all(run_ranks(ranks, [&](Communicator& comm) { return comm.barrier(soon()); }),
             absl::StatusCode::kUnavailable);
}

TEST_P(Conformance, KnowsItsPlace) {
  InProcessOptions options;
  options.epoch = 7;
  auto ranks = make_group(size(), options);
  for (int rank = 0; rank < size(); ++rank) {
    EXPECT_EQ(ranks[static_cast<size_t>(rank)]->rank(), rank);
    EXPECT_EQ(ranks[static_cast<size_t>(rank)]->size(), size());
    EXPECT_EQ(ranks[static_cast<size_t>(rank)]->epoch(), 7);
  }
}

INSTANTIATE_TEST_SUITE_P(InProcess, Conformance, testing::Values(1, 2, 3, 4, 8));

TEST(InProcess, ASizeBelowOneIsInvalid) {
  EXPECT_EQ(make_in_process_group(0).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace longspan
