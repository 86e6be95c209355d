// The watchdog's part of commlab._native. MPI_Init waits for all ranks with the GIL held, so no Python thread can tell
// that it waits in vain; this one needs no GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace {

// Whether somebody on this host has bound the local socket of this name (commlab/job/presence.py).
bool is_bound(const std::string& name) {
  sockaddr_un address{};
  if (name.size() + 1 > sizeof(address.sun_path)) return true;
  const int probe = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (probe < 0) return true;
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  const bool free_name = bind(probe, reinterpret_cast<const sockaddr*>(&address), length) == 0;
  close(probe);
  return !free_name;
}

class Watchdog {
 public:
  // After `seconds` without stop(): writes `text`, followed by the labels of those names that nobody has bound, or by
  // `nobody` if there are none, and ends the process with exit code 1.
  Watchdog(double seconds, std::string text, std::vector<std::string> names, std::vector<std::string> labels,
           std::string nobody)
      : thread_([=] {
          std::unique_lock<std::mutex> lock(mutex_);
          if (ended_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return stopped_; })) return;
          std::string missing;
          for (std::size_t i = 0; i < names.size() && i < labels.size(); ++i)
            if (!is_bound(names[i])) missing += (missing.empty() ? "" : ", ") + labels[i];
          const std::string line = text + (missing.empty() ? nobody : missing) + "\n";
          if (write(STDERR_FILENO, line.data(), line.size()) < 0) _exit(1);
          usleep(100000);  // MPICH's launcher drops what was written in the moment before
          _exit(1);
        }) {}
  ~Watchdog() { stop(); }

  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    ended_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  bool stopped_ = false;
  std::thread thread_;  // the last member: what it uses is there before it runs
};

}  // namespace

void register_watchdog(nb::module_& m) {
  nb::class_<Watchdog>(m, "Watchdog")
      .def(nb::init<double, std::string, std::vector<std::string>, std::vector<std::string>, std::string>())
      .def("stop", &Watchdog::stop, nb::call_guard<nb::gil_scoped_release>());
}
