// A million frames from a peer that has gone mad: no crash, no hang, no byte outside what a run asked for.
//
//   make fuzz-links        builds this with AddressSanitizer and UndefinedBehaviorSanitizer, and runs it
//
// An engine is rank 0 of two; the program is rank 1, by hand. It keeps count of the frames of each channel, so that
// most of them are taken for good ones, and spoils something in some: a bit, the length, the checksum, the sequence,
// the channel; or it sends less than it announced, or closes. When the connection has ended, operations are started for
// a while, as after the loss of a rank, and then the next session begins.
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "links/crc32c.h"
#include "links/engine.h"

using namespace commlab;
using namespace commlab::links;

namespace {

std::mt19937_64 random_bits;

std::size_t below(std::size_t limit) { return random_bits() % limit; }
bool one_in(std::size_t times) { return below(times) == 0; }

constexpr std::size_t kNumel = 3000, kManyNumel = 66'000;

// Memory with nothing allocated on either side: what is written outside is seen.
struct Buffer {
  std::unique_ptr<float[]> numbers{new float[kNumel]()};
};

std::shared_ptr<const Program> make_program() {
  // Receives of all kinds, each after the one before, and something to send in between.
  std::vector<Row> rows{{Opcode::kSend, 1, 0, 700},       {Opcode::kReduce, 1, 0, 700},  {Opcode::kWrite, 1, 700, 701},
                        {Opcode::kReduce, 1, 701, 2999},  {Opcode::kFinish, 0, 0, 2999}, {Opcode::kSend, 1, 0, 2999},
                        {Opcode::kWrite, 1, 2999, kNumel}};
  return std::make_shared<const Program>(rows, std::vector<std::uint32_t>{0, 1, 2, 3, 4, 6, 6, 6},
                                         std::vector<std::uint32_t>{1, 2, 3, 4, 5, 6}, kNumel, 2);
}

class Session {
 public:
  explicit Session(bool checks) : checks_(checks) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) std::abort();
    fd_ = ends[1];
    engine_ = std::make_unique<Engine>(0, std::vector<int>{-1, ends[0]}, checks, 0.0);
    engine_->add_group(0, {0, 1});
    engine_->add_group(1, {1, 0});
  }
  ~Session() {
    for (auto& [run, memory] : runs_) engine_->cancel(run);
    engine_.reset();
    close(fd_);
  }

  void post_something() {
    static const auto program = make_program();
    auto memory = std::make_unique<Buffer>();
    const auto group = static_cast<std::uint32_t>(below(2));
    std::shared_ptr<Run> run;
    switch (below(4)) {
      case 0:
        run = std::make_shared<Run>(Run::Kind::kMessage, group);
        run->peer = group == 0 ? 1 : 0;
        run->sends = one_in(2);
        run->data = reinterpret_cast<char*>(memory->numbers.get());
        run->bytes = below(kNumel * 4 + 1);
        break;
      case 1:
        run = std::make_shared<Run>(Run::Kind::kExchange, group);
        run->record = std::string(1 + below(600), 'r');
        break;
      default:
        run = std::make_shared<Run>(Run::Kind::kLaunch, group);
        run->record = one_in(4) ? "" : "announce";
        run->operand.buffer = reinterpret_cast<char*>(memory->numbers.get());
        run->operand.numel = kNumel;
        run->operand.divisor = 2;
        if (one_in(20) && !run->record.empty()) {
          // More than fits behind the announcement.
          memory->numbers.reset(new float[kManyNumel]());
          run->operand.buffer = reinterpret_cast<char*>(memory->numbers.get());
          run->operand.numel = kManyNumel;
          run->few = std::make_unique<Few>(Few{0, one_in(2), {0, (kManyNumel - 1) * 4, kManyNumel * 4}});
        } else if (one_in(2) && !run->record.empty())
          run->few = std::make_unique<Few>(one_in(3)   ? Few{kNumel * 4, false}
                                           : one_in(2) ? Few{0, true, {0, 4000, kNumel * 4}}
                                                       : Few{kNumel * 2, true});
        else if (group == 0)
          run->program = program;
    }
    engine_->post(run, true, one_in(2));
    runs_.emplace_back(std::move(run), std::move(memory));
  }

  // False once the engine has closed the connection, or this end has.
  bool send_frame() {
    static const std::size_t lengths[] = {0, 1, 4, 8, 20, 600, 1200, 2800, 4000, 6008, 9192, 12000, 12008};
    Header header{};
    header.channel = one_in(30)   ? static_cast<std::uint32_t>(random_bits())
                     : one_in(12) ? kControl
                                  : static_cast<std::uint32_t>(below(4));
    header.sequence = header.channel == kControl ? static_cast<std::uint32_t>(below(5)) : sent_[header.channel]++;
    header.length = static_cast<std::uint32_t>(one_in(6) ? below(kFrameBytes + 2) : lengths[below(std::size(lengths))]);
    if (header.channel == kControl && !one_in(10)) header.length = static_cast<std::uint32_t>(below(40));
    std::vector<char> frame(kHeaderBytes + header.length);
    for (std::size_t at = kHeaderBytes; at < frame.size(); at += 64) frame[at] = static_cast<char>(random_bits());
    if (header.length >= 8 && one_in(2)) std::memcpy(frame.data() + kHeaderBytes, "announce", 8);
    if (header.channel == kControl && header.length >= 8 && !one_in(4)) {
      // Words that may be true: a group that there is, or is not yet, and a rank.
      const std::uint32_t words[] = {static_cast<std::uint32_t>(below(4)), static_cast<std::uint32_t>(below(2))};
      std::memcpy(frame.data() + kHeaderBytes, words, sizeof(words));
    }
    if (checks_) header.check = crc32c(0, frame.data() + kHeaderBytes, header.length) ^ crc32c(0, &header, 12);
    std::memcpy(frame.data(), &header, kHeaderBytes);
    if (one_in(40)) frame[below(frame.size())] ^= static_cast<char>(1 << below(8));
    if (one_in(200)) frame.resize(below(frame.size()));
    const bool sent = send_bytes(frame);
    if (one_in(150)) shutdown(fd_, SHUT_WR);
    return sent;
  }

  void help() {
    if (runs_.empty()) return;
    const std::size_t at = below(runs_.size());
    const std::shared_ptr<Run> run = runs_[at].first;
    engine_->wait(*run, one_in(20) ? 0.0005 : 1e-6);
    if (one_in(50)) engine_->awaited_peers(*run);
    if (run->ended() || one_in(60)) {
      // Ended, or given up: the engine must not touch the memory from now on.
      engine_->cancel(run);
      runs_.erase(runs_.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }

 private:
  bool send_bytes(const std::vector<char>& bytes) {
    std::size_t at = 0;
    for (int tries = 0; at < bytes.size() && tries < 200; ++tries) {
      const ssize_t sent = send(fd_, bytes.data() + at, bytes.size() - at, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent > 0) at += static_cast<std::size_t>(sent);
      char bin[4096];
      while (recv(fd_, bin, sizeof(bin), MSG_DONTWAIT) > 0) {
      }
      if (sent < 0) {
        if (errno != EAGAIN) return false;
        post_something();
        help();
      }
    }
    return at == bytes.size();
  }

  const bool checks_;
  int fd_;
  std::unique_ptr<Engine> engine_;
  std::vector<std::pair<std::shared_ptr<Run>, std::unique_ptr<Buffer>>> runs_;
  std::map<std::uint32_t, std::uint32_t> sent_;
};

}  // namespace

int main(int count, char** arguments) {
  const std::size_t frames = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1000000;
  random_bits.seed(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1);
  std::size_t sent = 0, sessions = 0;
  while (sent < frames) {
    Session session(!one_in(4));
    ++sessions;
    for (std::size_t at = 0; at < 200 && sent < frames; ++at) {
      if (one_in(2)) session.post_something();
      ++sent;
      if (!session.send_frame()) {
        for (int after = 0; after < 5; ++after) {
          session.post_something();
          session.help();
        }
        break;
      }
      if (one_in(2)) session.help();
    }
  }
  std::printf("%zu frames in %zu sessions\n", sent, sessions);
}
