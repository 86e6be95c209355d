#include "sync.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <stdexcept>

namespace commlab {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough for 8 ranks to pass on 2 cores, slow ones too; only a core that nobody wants is spent on it in vain.
constexpr double kYieldUs = 500;
// Most waits between ranks that each have a core are over sooner.
constexpr double kYieldAfterUs = 20;

// Not FUTEX_PRIVATE: the waiters are other processes.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t seen, double timeout_us) {
  const auto ns = static_cast<long>(timeout_us * 1e3);
  const timespec timeout{ns / 1000000000, ns % 1000000000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

NodeSync::NodeSync(std::size_t rank, std::vector<Control*> pages, double spin_us)
    : rank_(rank), pages_(std::move(pages)), spin_us_(spin_us), look_(spin_us) {
  if (rank_ >= pages_.size()) throw std::invalid_argument("rank outside of the node");
  arrivals_ = pages_[rank_]->arrived.load(std::memory_order_relaxed);
}

void NodeSync::publish(std::uint64_t record, std::uint64_t segment, std::uint64_t offset, const void* data,
                       std::size_t bytes) {
  if (bytes > kInlineBytes) throw std::invalid_argument("too much inline data");
  ++published_;
  Control& mine = *pages_[rank_];
  mine.slots[published_ % 2] = Slot{record, segment, offset};
  if (bytes) std::memcpy(mine.inline_data[published_ % 2], data, bytes);
}

void NodeSync::arrive() {
  // seq_cst, as are the loads of lagging(): of the ranks that arrive last, at least one sees that all have. A second
  // one does no harm: until it arrives again, nobody gets any further.
  pages_[rank_]->arrived.store(++arrivals_, std::memory_order_seq_cst);
  first_unseen_ = 0;
  if (lagging() >= 0) return;
  Control& first = *pages_[0];
  first.released.store(arrivals_, std::memory_order_seq_cst);
  if (first.sleepers.load(std::memory_order_seq_cst)) futex_wake_all(first.released);
}

int NodeSync::lagging() {
  for (; first_unseen_ < pages_.size(); ++first_unseen_) {
    const std::uint32_t theirs = pages_[first_unseen_]->arrived.load(std::memory_order_seq_cst);
    // Counters wrap; their difference does not.
    if (static_cast<std::int32_t>(theirs - arrivals_) < 0) return static_cast<int>(first_unseen_);
  }
  return -1;
}

int NodeSync::wait(double timeout_us, bool soon) {
  int late = lagging();
  if (late < 0) return late;
  const auto start = Clock::now();
  const auto waited_us = [&] { return std::chrono::duration<double, std::micro>(Clock::now() - start).count(); };
  bool lost_core = false;
  if (spin_us_ > 0) {
    const double limit_us = std::min(look_.us(), timeout_us);
    double looked_us = 0;
    do {
      const double before_us = looked_us;
      for (int round = 0; round < 64; ++round) {
        if ((late = lagging()) < 0) {
          look_.learn(waited_us(), true, false);
          return late;
        }
        relax();
      }
      // A core that nobody else wants comes back in less than a microsecond.
      if (looked_us > kYieldAfterUs) sched_yield();
      looked_us = waited_us();
      lost_core = Look::lost_core(looked_us - before_us);
    } while (looked_us < limit_us && !lost_core);
  }
  if (soon && spin_us_ <= 0) {
    for (const double limit_us = std::min(kYieldUs, timeout_us); waited_us() < limit_us;) {
      sched_yield();
      if ((late = lagging()) < 0) return late;
    }
  }
  Control& first = *pages_[0];
  for (double left_us; (late = lagging()) >= 0 && (left_us = timeout_us - waited_us()) > 0;) {
    // Whoever arrives last writes `released` before it looks for sleepers, and we look at the arrivals after we have
    // announced ourselves: so either we see them all here, or the word is no longer what it was, or we are woken.
    const std::uint32_t seen = first.released.load(std::memory_order_seq_cst);
    first.sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (lagging() >= 0) futex_wait(first.released, seen, left_us);
    first.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
  if (spin_us_ > 0) look_.learn(waited_us(), late < 0, lost_core);
  return late;
}

}  // namespace commlab
