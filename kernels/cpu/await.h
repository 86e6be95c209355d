// The wait for a word of shared memory: look for as long as looking has paid, hand the core on, sleep in the kernel.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "look.h"

namespace commlab {

// Not FUTEX_PRIVATE: the waiters are other processes.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t seen, double timeout_us);
void futex_wake_all(std::atomic<std::uint32_t>& word);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long at most a waiter that shares its core hands it on. Long enough for 8 ranks to pass on 2 cores, slow ones
// too; only a core that nobody wants is spent on it in vain.
constexpr double kYieldUs = 500;

// Waits until `late()` is below 0, which means that nobody is late any more; returns what it says then, or after
// timeout_us. Whoever makes it so changes `word` first, and then wakes its sleepers if `sleepers` counts any. spin_us:
// how long to look at most before going to sleep; 0 where ranks share cores, because there the spinner keeps the
// awaited rank from running. soon: all there is to do before the wait ends is next to nothing, so where ranks share
// cores this one hands its core on for a moment before it goes to sleep. yield_after_us: from then on whoever looks
// offers its core to others between two glances: at once where the wait is for a message of another node, whose ranks
// may be on this machine too; later where most waits are over sooner.
template <class Late>
int await(const Late& late_of, std::atomic<std::uint32_t>& word, std::atomic<std::uint32_t>& sleepers, Look& look,
          double spin_us, double timeout_us, bool soon, double yield_after_us) {
  using Clock = std::chrono::steady_clock;
  int late = late_of();
  if (late < 0) return late;
  const auto start = Clock::now();
  const auto waited_us = [&] { return std::chrono::duration<double, std::micro>(Clock::now() - start).count(); };
  bool lost_core = false;
  if (spin_us > 0) {
    // Where others compute on this core, an offer of it costs a time slice, and a sleeper is woken at once.
    const bool sleeps_at_once = look.shy() && yield_after_us <= 0;
    const double limit_us = sleeps_at_once ? 0 : std::min(look.us(), timeout_us);
    double looked_us = 0;
    while (looked_us < limit_us && !lost_core) {
      const double before_us = looked_us;
      for (int round = 0; round < 64; ++round) {
        if ((late = late_of()) < 0) {
          look.learn(waited_us(), true, false);
          return late;
        }
        relax();
      }
      // A core that nobody else wants comes back in less than a microsecond.
      if (looked_us >= yield_after_us) sched_yield();
      looked_us = waited_us();
      lost_core = Look::lost_core(looked_us - before_us);
    }
  }
  if (soon && spin_us <= 0) {
    for (const double limit_us = std::min(kYieldUs, timeout_us); waited_us() < limit_us;) {
      sched_yield();
      if ((late = late_of()) < 0) return late;
    }
  }
  for (double left_us; (late = late_of()) >= 0 && (left_us = timeout_us - waited_us()) > 0;) {
    // Who ends the wait changes the word before it looks for sleepers, and we ask again after we have announced
    // ourselves: so either nobody is late any more here, or the word is no longer what it was, or we are woken.
    const std::uint32_t seen = word.load(std::memory_order_seq_cst);
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (late_of() >= 0) futex_wait(word, seen, left_us);
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
  if (spin_us > 0) look.learn(waited_us(), late < 0, lost_core);
  return late;
}

}  // namespace commlab
