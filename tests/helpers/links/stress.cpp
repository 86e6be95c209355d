// Three engines in one process, each with threads that start operations and threads that wait for them, for
// ThreadSanitizer: `make stress-links`. Results are checked.
#include <sys/socket.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "links/engine.h"

using namespace commlab;
using namespace commlab::links;

namespace {

constexpr std::uint32_t kRanks = 3;
constexpr std::size_t kNumel = 30000;

// A ring of one chunk: everybody's numbers are added on rank 0, 1, 2 in turn, and the sum goes round.
std::shared_ptr<const Program> chain(std::uint32_t rank) {
  std::vector<Row> rows;
  std::vector<std::uint32_t> first{0}, after;
  const auto add = [&](Opcode opcode, std::uint32_t peer) {
    if (!rows.empty()) after.push_back(static_cast<std::uint32_t>(rows.size()));
    if (!rows.empty()) first.push_back(static_cast<std::uint32_t>(after.size()));
    rows.push_back({opcode, peer, 0, kNumel});
  };
  if (rank > 0) add(Opcode::kReduce, rank - 1);
  if (rank < kRanks - 1) add(Opcode::kSend, rank + 1);
  if (rank < kRanks - 1) add(Opcode::kWrite, rank + 1);
  if (rank > 0) add(Opcode::kSend, rank - 1);
  first.push_back(static_cast<std::uint32_t>(after.size()));
  return std::make_shared<const Program>(rows, first, after, kNumel, kRanks);
}

void require(bool fact, const char* what) {
  if (fact) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

// One thread of one rank: operations of a group of its own, some awaited at once, some started ahead.
void work(Engine& engine, std::uint32_t rank, std::uint32_t group, int rounds) {
  const auto program = chain(rank);
  std::vector<std::pair<std::shared_ptr<Run>, std::vector<float>>> started;
  const auto finish = [&] {
    for (auto& [run, numbers] : started) {
      while (!engine.wait(*run, 0.05)) engine.awaited_peers(*run);
      require(run->status == Status::kDone, "a run failed");
      for (float number : numbers) require(number == 6, "a sum");
    }
    started.clear();
  };
  for (int round = 0; round < rounds; ++round) {
    auto run = std::make_shared<Run>(Run::Kind::kLaunch, group);
    const bool few = round % 3 == 1, many = round % 9 == 4;  // many: more than fits behind the announcement
    started.emplace_back(run, std::vector<float>(many ? 80'000 : few ? 500 : kNumel, static_cast<float>(rank + 1)));
    run->record = "12345678";
    run->operand.buffer = reinterpret_cast<char*>(started.back().second.data());
    run->operand.numel = started.back().second.size();
    if (many)
      run->few = std::make_unique<Few>(Few{0, round % 2 == 0, {0, 280'000, 300'000, 320'000}});
    else if (few)
      run->few = std::make_unique<Few>(round % 2 ? Few{2000, false} : Few{668, true});
    else
      run->program = program;
    engine.post(run, round % 4 == 0, round % 5 != 0);
    if (round % 4 == 0) finish();
  }
  finish();
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 300;
  std::vector<std::vector<int>> ends(kRanks, std::vector<int>(kRanks, -1));
  for (std::uint32_t one = 0; one < kRanks; ++one)
    for (std::uint32_t other = 0; other < one; ++other) {
      int pair[2];
      require(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "a socket pair");
      ends[one][other] = pair[0];
      ends[other][one] = pair[1];
    }
  std::vector<std::unique_ptr<Engine>> engines;
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
    engines.push_back(std::make_unique<Engine>(rank, ends[rank], true, 0.0));
    for (std::uint32_t group = 0; group < 2; ++group) engines.back()->add_group(group, {0, 1, 2});
  }
  std::vector<std::thread> threads;
  for (std::uint32_t rank = 0; rank < kRanks; ++rank)
    for (std::uint32_t group = 0; group < 2; ++group)
      threads.emplace_back([&, rank, group] { work(*engines[rank], rank, group, rounds); });
  for (std::thread& thread : threads) thread.join();
  for (auto& engine : engines) engine->leave(1.0);
  std::printf("%d operations of each of %u groups on %u ranks\n", rounds, 2u, kRanks);
}
