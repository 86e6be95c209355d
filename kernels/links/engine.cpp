#include "engine.h"

#include <linux/sockios.h>
#include <pthread.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "descriptors.h"
#include "record.h"

namespace commlab::links {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr std::uint64_t kWakeUp = ~0ull;
constexpr int kEvents = 64;

// Whoever leaves in a hurry still gives its last words so long to arrive. A connection that is closed while it holds
// what nobody has read is reset, and what was to be sent is dropped: then a peer would take this rank for the one that
// is lost, and not the one of which this rank had told it.
constexpr double kLastWordsS = 0.1;

// Whether the peer's kernel has not yet got all that was written to the connection.
bool unheard(const Link& link) {
  int bytes = 0;
  return ioctl(link.fd(), SIOCOUTQ, &bytes) == 0 && bytes > 0;
}

// Whether the run moves so much that a wake-up costs next to nothing: then a look would only take the core's time.
constexpr std::size_t kBulkBytes = 4 << 20;
bool in_bulk(const Run& run) {
  return run.phase == Run::Phase::kMoving && run.operand.numel * run.operand.item_bytes() >= kBulkBytes;
}

}  // namespace

Engine::Engine(std::uint32_t rank, const std::vector<int>& fds, bool checks, double look_us)
    : rank_(rank), look_(look_us) {
  if (rank >= fds.size()) throw std::invalid_argument("the rank is not among the connections");
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  wake_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (epoll_ < 0 || wake_ < 0) throw std::runtime_error("no epoll for the links");
  remember(epoll_);
  remember(wake_);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWakeUp;
  epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event);
  for (std::uint32_t peer = 0; peer < fds.size(); ++peer) {
    if (peer == rank) {
      links_.push_back(nullptr);
      continue;
    }
    links_.push_back(std::make_unique<Link>(*this, peer, fds[peer], checks));
    event.events = links_.back()->interest = EPOLLIN | EPOLLRDHUP;
    event.data.u64 = peer;
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fds[peer], &event) != 0)
      throw std::runtime_error("epoll takes no connection to rank " + std::to_string(peer));
  }
}

Engine::~Engine() {
  {
    const std::lock_guard<std::mutex> held(mutex_);
    stopping_ = true;
  }
  thread_wanted_.notify_all();
  poke();
  if (thread_.joinable()) thread_.join();
  links_.clear();
  forget(epoll_);
  forget(wake_);
  ::close(epoll_);
  ::close(wake_);
}

void Engine::poke() {
  const std::uint64_t one = 1;
  const ssize_t written = write(wake_, &one, sizeof(one));
  (void)written;  // full: somebody has poked already
}

bool Engine::busy() const { return under_way_ > 0 || posted_count_ > 0; }

void Engine::post(std::shared_ptr<Run> run, bool awaited, bool here) {
  {
    const std::lock_guard<std::mutex> held(posted_mutex_);
    posted_.push_back(std::move(run));
    ++posted_count_;
  }
  // Whoever is awake in the loop looks at posted_ once more before it sleeps.
  if (awake_) return;
  std::unique_lock<std::mutex> lock(mutex_);
  if (here)
    work(lock);
  else if (asleep_)
    poke();
  if (!awaited) hand_over(lock);
}

// Nobody waits any more: what is under way goes on in the engine's own thread.
void Engine::hand_over(std::unique_lock<std::mutex>& lock) {
  if (driving_ || waiting_ > 0 || stopping_ || !busy()) return;
  if (!thread_.joinable()) thread_ = std::thread([this] { serve(); });
  lock.unlock();
  thread_wanted_.notify_one();
}

// Does everything that can be done without waiting.
void Engine::work(std::unique_lock<std::mutex>&) {
  for (;;) {
    awake_ = true;
    for (;;) {
      std::shared_ptr<Run> run;
      {
        const std::lock_guard<std::mutex> held(posted_mutex_);
        if (posted_.empty()) break;
        run = std::move(posted_.front());
        posted_.pop_front();
        --posted_count_;
      }
      admit(run);
    }
    settle();
    awake_ = false;
    if (posted_count_ == 0) return;
  }
}

// Waits for events, asleep; a caller that waits (`looks`) looks for them first, so long as it has learned to. Between
// two glances others may have the core, the awaited rank for one; where others compute on it, that costs a time slice,
// and a sleeper is woken at once.
int Engine::events_within(double timeout_s, bool looks, epoll_event* events) {
  const int timeout_ms = timeout_s < 0 ? -1 : static_cast<int>(std::min(timeout_s, 1e6) * 1e3 + 0.999);
  if (!looks) return epoll_wait(epoll_, events, kEvents, timeout_ms);
  const auto start = Clock::now();
  const double limit_us = look_.shy() ? 0 : std::min(look_.us(), timeout_s * 1e6);
  bool lost_core = false;
  int found = 0;
  for (double now_us = 0; now_us < limit_us && !lost_core;) {
    found = epoll_wait(epoll_, events, kEvents, 0);
    if (found != 0) break;
    sched_yield();
    const double before_us = now_us;
    now_us = seconds_since(start) * 1e6;
    lost_core = Look::lost_core(now_us - before_us);
  }
  if (found == 0) found = epoll_wait(epoll_, events, kEvents, timeout_ms);
  look_.learn(seconds_since(start) * 1e6, found > 0, lost_core);
  return found;
}

// One round of the loop: work, sleep until something happens, work. `until`: comes back before sleeping once that run
// has ended.
void Engine::drive(std::unique_lock<std::mutex>& lock, double timeout_s, const Run* until) {
  work(lock);
  if (until && until->ended()) return;
  const bool looks = until && !in_bulk(*until);
  asleep_ = true;
  lock.unlock();
  epoll_event events[kEvents];
  const int found = events_within(timeout_s, looks, events);
  lock.lock();
  asleep_ = false;
  awake_ = true;
  for (int at = 0; at < found; ++at) {
    if (events[at].data.u64 == kWakeUp) {
      std::uint64_t count;
      const ssize_t got = read(wake_, &count, sizeof(count));
      (void)got;
      continue;
    }
    Link& link = *links_[events[at].data.u64];
    const std::uint32_t what = events[at].events;
    if (!link.open()) continue;
    if (what & EPOLLOUT) link.pump_out();
    if (link.open() && what & EPOLLIN) {
      // Small frames that come too early wait in the link, and epoll is told nothing; more than those is not read.
      if (link.blocked())
        update_interest(link, /*quiet=*/true);
      else
        link.pump_in();
    }
    if (link.open() && what & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) link.drain();
    look_at(link);
  }
  work(lock);
}

// Asks epoll for what the link waits for. `quiet`: not to be told of bytes that nobody wants yet.
void Engine::update_interest(Link& link, bool quiet) {
  if (!link.open()) return;
  std::uint32_t wanted = EPOLLRDHUP;
  if (!link.blocked() || (!quiet && link.interest & EPOLLIN)) wanted |= EPOLLIN;
  if (link.wants_out()) wanted |= EPOLLOUT;
  if (wanted == link.interest) return;
  epoll_event event{};
  event.events = link.interest = wanted;
  event.data.u64 = link.peer();
  epoll_ctl(epoll_, EPOLL_CTL_MOD, link.fd(), &event);
}

bool Engine::wait(const Run& run, double timeout_s) {
  if (run.ended()) return true;
  const auto start = Clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  ++waiting_;
  for (;;) {
    if (run.ended()) break;
    const double left_s = timeout_s - seconds_since(start);
    if (left_s <= 0) break;
    if (!driving_) {
      driving_ = true;
      drive(lock, left_s, &run);
      driving_ = false;
    } else {
      if (thread_drives_) poke();
      changed_.wait_for(lock, std::chrono::duration<double>(left_s));
    }
  }
  --waiting_;
  if (waiting_ > 0)
    changed_.notify_all();  // one of them takes the loop over
  else if (run.ended())
    hand_over(lock);  // who comes back before the end only looks for signals, and goes on to wait
  return run.ended();
}

bool Engine::announced_by_others(std::uint32_t id, std::uint64_t sequence) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!driving_) {
    driving_ = true;
    drive(lock, 0, nullptr);
    driving_ = false;
    if (waiting_ > 0) changed_.notify_all();
  }
  const auto found = groups_.find(id);
  if (found == groups_.end() || found->second->broken.status != Status::kPending) return true;
  bool announced = false;
  for (const std::uint32_t rank : found->second->ranks) {
    Link* link = links_[rank].get();
    if (!link) continue;
    link->take_arrived();
    look_at(*link);
    // Nothing earlier is under way, so the first frame that nobody has asked for is an announcement.
    const std::vector<char>* first = link->first_early(program_channel(id));
    announced =
        announced || (first && (first->size() < kAnnouncedBytes || announced_sequence(first->data()) <= sequence));
  }
  work(lock);
  hand_over(lock);
  return announced;
}

// The engine's own thread.
void Engine::serve() {
  pthread_setname_np(pthread_self(), "commlab links");
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    if (waiting_ > 0 || driving_ || !busy()) {
      thread_wanted_.wait(lock);
      continue;
    }
    driving_ = thread_drives_ = true;
    drive(lock, -1, nullptr);
    driving_ = thread_drives_ = false;
    if (waiting_ > 0) changed_.notify_all();
  }
}

void Engine::leave(double timeout_s) {
  const auto start = Clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  work(lock);
  for (const auto& link : links_)
    if (link && link->open()) {
      link->post_control(kLeaving, nullptr, 0);
      link->pump_out();
      update_interest(*link);
    }
  const auto on_its_way = [](const auto& link) {
    return link && link->open() && (link->wants_out() || unheard(*link));
  };
  ++waiting_;
  for (double left_s; std::any_of(links_.begin(), links_.end(), on_its_way) &&
                      (left_s = std::max(timeout_s, kLastWordsS) - seconds_since(start)) > 0;) {
    if (driving_) {
      if (thread_drives_) poke();
      changed_.wait_for(lock, std::chrono::milliseconds(10));
      continue;
    }
    driving_ = true;
    drive(lock, std::min(0.001, left_s), nullptr);
    driving_ = false;
  }
  --waiting_;
  for (const auto& link : links_)
    if (link) link->close();
}

}  // namespace commlab::links
