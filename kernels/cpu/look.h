// How long a thread that waits looks again at once before it goes to sleep: learned from its waits. A sleep costs the
// sleeper's wake-up, tens of microseconds; a look costs the core.
#pragma once

#include <algorithm>

namespace commlab {

class Look {
 public:
  // most_us: the longest look; 0: never look.
  explicit Look(double most_us) : most_us_(most_us), us_(most_us) {}

  // The next wait's look.
  double us() const { return shy() ? std::min(kLeastUs, us_) : us_; }
  // Whether others wanted the core when this thread last looked for long.
  bool shy() const { return shy_waits_ > 0; }

  // Whether a look that took so long from one glance to the next has lost its core meanwhile: a core whose other users
  // run for a time slice comes back after a millisecond or more; an interrupt takes less.
  static bool lost_core(double glance_us) { return glance_us > 200; }

  // A wait is over, or was given up. A wait that a longer look would have seen the end of makes the next look longer,
  // one that lasted longer than the longest look makes it shorter. Where the thread lost its core while it looked,
  // others want that core, and the next waits hardly look at all; the more of them, the more often that was so.
  void learn(double waited_us, bool arrived, bool lost_core) {
    if (lost_core) {
      shy_waits_ = next_shy_waits_;
      next_shy_waits_ = std::min(kMostShyWaits, 2 * next_shy_waits_);
    } else if (shy()) {
      --shy_waits_;
    } else {
      next_shy_waits_ = kShyWaits;
    }
    if (arrived && waited_us <= most_us_)
      us_ = std::min(most_us_, std::max(us_, 2 * waited_us));
    else
      us_ = std::max(std::min(kLeastUs, most_us_), us_ / 2);
  }

 private:
  static constexpr double kLeastUs = 20;
  static constexpr int kShyWaits = 64, kMostShyWaits = 4096;

  double most_us_, us_;
  int shy_waits_ = 0, next_shy_waits_ = kShyWaits;
};

}  // namespace commlab
