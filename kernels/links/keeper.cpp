#include "keeper.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>

#include "descriptors.h"

#if defined(__x86_64__) || defined(__aarch64__)
#define COMMLAB_KEEPER
#endif

namespace commlab::links {

#ifdef COMMLAB_KEEPER
namespace {

// The same numbers on all architectures; older headers lack them.
constexpr long kPidfdOpen = 434, kCloseRange = 436;
constexpr std::size_t kStackBytes = 16 * 1024;
constexpr char kName[] = "commlab keeper";

// Lies at the low end of the keeper's stack, so that the keeper needs nothing of the thread that made it.
struct Shared {
  pid_t owner;
  int pipe;
  pollfd watched[2];
  std::atomic<bool> ready;
};

// The stack's canary lies in thread-local memory, which here would be that of the thread that made the keeper, long
// after that thread has ended.
#ifdef __has_attribute
#if __has_attribute(no_stack_protector)
#define COMMLAB_NO_CANARY __attribute__((no_stack_protector))
#endif
#endif
#ifndef COMMLAB_NO_CANARY
#define COMMLAB_NO_CANARY __attribute__((optimize("no-stack-protector")))
#endif

// A system call without libc's errno, for the same reason.
COMMLAB_NO_CANARY inline long call(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0) {
#ifdef __x86_64__
  long result = number;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  __asm__ volatile("syscall" : "+a"(result) : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
  return result;
#else
  register long x8 __asm__("x8") = number;
  register long x0 __asm__("x0") = a;
  register long x1 __asm__("x1") = b;
  register long x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d;
  register long x4 __asm__("x4") = e;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
  return x0;
#endif
}

// The whole life of a keeper. Where something is refused it ends, and everything is as without it.
COMMLAB_NO_CANARY int keep(void* argument) {
  auto* shared = static_cast<Shared*>(argument);
  const auto last = static_cast<long>(~0u);
  call(SYS_setsid);
  call(SYS_prctl, PR_SET_NAME, reinterpret_cast<long>(kName));
  if (shared->pipe > 0 && call(kCloseRange, 0, shared->pipe - 1) < 0) return 1;
  if (call(kCloseRange, shared->pipe + 1, last) < 0) return 1;
  // The pipe's other end closes when the owner ends or becomes another program. A child that some library has forked by
  // a system call of its own keeps that end open: so the owner itself is watched as well. While it is the parent, its
  // number is nobody else's.
  const long process = call(kPidfdOpen, shared->owner);
  if (process < 0 || call(SYS_getppid) != shared->owner) return 1;
  shared->watched[0] = {shared->pipe, POLLIN, 0};
  shared->watched[1] = {static_cast<int>(process), POLLIN, 0};
  shared->ready = true;
  while (call(SYS_ppoll, reinterpret_cast<long>(shared->watched), 2) <= 0) {
  }
  return 0;
}

}  // namespace

bool Keeper::start() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return false;
  end_ = ends[1];
  remember(end_);
  owner_ = getpid();
  stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  if (stack_ == MAP_FAILED) {
    stack_ = nullptr;
    close(ends[0]);
    return false;
  }
  auto* shared = new (stack_) Shared{owner_, ends[0], {}, {false}};
  // No handler of this process may ever run there. libc's own mask would leave out the signals that libc itself uses.
  const std::uint64_t all = ~0ull;
  std::uint64_t before = 0;
  syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof(all));
  pid_ = clone(&keep, static_cast<char*>(stack_) + kStackBytes, CLONE_VM, shared);
  syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, nullptr, sizeof(before));
  close(ends[0]);
  while (pid_ > 0 && !shared->ready) {
    if (waitpid(pid_, nullptr, __WCLONE | WNOHANG) == pid_) pid_ = -1;
    usleep(50);
  }
  return pid_ > 0;
}

Keeper::~Keeper() {
  // In a forked child the end of the pipe is closed already, and the keeper is the parent's.
  if (owner_ != getpid()) return;
  if (pid_ > 0) {
    // Not by closing the pipe alone: somebody may have stopped the keeper.
    kill(pid_, SIGKILL);
    while (waitpid(pid_, nullptr, __WCLONE) < 0 && errno == EINTR) {
    }
  }
  if (end_ >= 0) {
    forget(end_);
    close(end_);
  }
  if (stack_) munmap(stack_, kStackBytes);
}
#else
bool Keeper::start() { return false; }
Keeper::~Keeper() = default;
#endif

pid_t Keeper::pid() const { return owner_ == getpid() ? pid_ : 0; }

std::shared_ptr<Keeper> Keeper::of_this_process() {
  static std::mutex mutex;
  static std::weak_ptr<Keeper> known;
  const std::lock_guard<std::mutex> held(mutex);
  std::shared_ptr<Keeper> keeper = known.lock();
  if (keeper && keeper->pid() > 0) return keeper;
  keeper.reset(new Keeper);
  if (!keeper->start()) return nullptr;
  known = keeper;
  return keeper;
}

}  // namespace commlab::links
