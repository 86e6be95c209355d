#include "descriptors.h"

#include <pthread.h>
#include <unistd.h>

#include <mutex>
#include <set>

namespace commlab::links {
namespace {

struct Kept {
  std::mutex mutex;
  std::set<int> open;
};

Kept& kept() {
  static auto* all = new Kept;  // outlives every engine
  return *all;
}

void close_in_child() {
  for (const int each : kept().open) ::close(each);
  kept().open.clear();
  kept().mutex.unlock();
}

}  // namespace

void remember(int fd) {
  static const int once = pthread_atfork([] { kept().mutex.lock(); }, [] { kept().mutex.unlock(); }, &close_in_child);
  (void)once;
  const std::lock_guard<std::mutex> held(kept().mutex);
  kept().open.insert(fd);
}

void forget(int fd) {
  const std::lock_guard<std::mutex> held(kept().mutex);
  kept().open.erase(fd);
}

}  // namespace commlab::links
