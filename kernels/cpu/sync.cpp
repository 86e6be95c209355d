#include "sync.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cstring>
#include <stdexcept>

#include "await.h"

namespace commlab {
namespace {

// Most waits between ranks that each have a core are over sooner.
constexpr double kYieldAfterUs = 20;

}  // namespace

void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t seen, double timeout_us) {
  const auto ns = static_cast<long>(timeout_us * 1e3);
  const timespec timeout{ns / 1000000000, ns % 1000000000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

NodeSync::NodeSync(std::size_t rank, std::vector<Control*> pages, double spin_us)
    : rank_(rank), pages_(std::move(pages)), spin_us_(spin_us), look_(spin_us) {
  if (rank_ >= pages_.size()) throw std::invalid_argument("rank outside of the node");
  arrivals_ = pages_[rank_]->arrived.load(std::memory_order_relaxed);
}

void NodeSync::publish(std::uint64_t record, std::uint64_t segment, std::uint64_t offset, const void* data,
                       std::size_t bytes) {
  if (bytes > kInlineBytes) throw std::invalid_argument("too much inline data");
  ++published_;
  pages_[rank_]->slots[published_ % 2] = Slot{record, segment, offset};
  if (bytes) std::memcpy(inline_data(rank_), data, bytes);
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

bool NodeSync::agreed() const {
  for (std::size_t rank = 1; rank < size(); ++rank)
    if (slot(rank).record != slot(0).record) return false;
  return true;
}

int NodeSync::wait(double timeout_us, bool soon) {
  // The rank that arrives last stores `released` before it looks for sleepers.
  Control& first = *pages_[0];
  return await([this] { return lagging(); }, first.released, first.sleepers, look_, spin_us_, timeout_us, soon,
               kYieldAfterUs);
}

}  // namespace commlab
