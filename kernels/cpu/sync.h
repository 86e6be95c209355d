// How the ranks of a node wait for each other: one page per rank, written by that rank alone (but for the numbers of
// two ranks, see NodeSync::holder), read by all. Only the first rank's page has a place where everyone sleeps, and
// whoever arrives last wakes them all: with more ranks than cores a sleeper wakes once an operation, not once a peer.
// Counters only grow; nothing is ever locked, so a rank that dies leaves nothing held.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "look.h"

namespace commlab {

constexpr std::uint64_t kMagic = 0x31776c6d6d6f63ull;  // "commlw1"
constexpr std::uint32_t kAbi = 4;
constexpr std::size_t kInlineBytes = 64 * 1024;
constexpr std::size_t kMaxSegments = 1024;

// What a rank says of its next operation before it arrives at it.
struct Slot {
  std::uint64_t record;   // hash of (sequence, operation, dtype, shape, name)
  std::uint64_t segment;  // where its data lie: segment and byte offset; all ones: an ordinary tensor
  std::uint64_t offset;
};

// A segment's number names it for ever: number % kMaxSegments is its place in the table, which a later segment, of
// another number, gets once this one is given back.
struct SegmentEntry {
  std::atomic<std::uint64_t> number;  // all ones: none
  std::uint64_t fd;                   // the owner's descriptor; peers open it through /proc
  std::uint64_t bytes;
};

// A rank's page. Two slots, used in turn: a rank can publish operation k + 2 only after everyone has arrived at k + 1,
// that is after everyone has read the slots of k.
struct Control {
  std::uint64_t magic;
  std::uint32_t abi;
  std::uint32_t local_rank;
  std::uint8_t token[16];
  std::uint64_t commit_word;  // reserved: steps that survive the death of a rank
  alignas(64) std::atomic<std::uint32_t> arrived;
  alignas(64) std::atomic<std::uint32_t> released;  // of the first rank: how often all have arrived, the futex
  alignas(64) std::atomic<std::uint32_t> sleepers;  // of the first rank: who waits for it
  alignas(64) Slot slots[2];
  alignas(64) std::uint8_t inline_data[2][kInlineBytes];
  alignas(64) SegmentEntry segments[kMaxSegments];
};

static_assert(std::atomic<std::uint32_t>::is_always_lock_free, "shared between processes");

class NodeSync {
 public:
  // pages[r]: rank r's page as this process has it mapped. spin_us: how long to look at most before going to sleep; 0
  // where ranks share cores, because there the spinner keeps the awaited rank from running.
  NodeSync(std::size_t rank, std::vector<Control*> pages, double spin_us);

  std::size_t rank() const { return rank_; }
  std::size_t size() const { return pages_.size(); }
  Control& page(std::size_t rank) const { return *pages_[rank]; }

  // Fill this rank's next slot, to be seen by peers after arrive(); `data` (up to kInlineBytes) travels in the page
  // itself.
  void publish(std::uint64_t record, std::uint64_t segment, std::uint64_t offset, const void* data, std::size_t bytes);
  // Tell everyone that all that this rank wrote so far may be read.
  void arrive();
  // The lowest rank that has not arrived as often as this one, or -1.
  int lagging();
  // The same after waiting up to timeout_us. soon: all there is to do before the others arrive is next to nothing, so
  // where ranks share cores this one hands its core on for a moment before it goes to sleep.
  int wait(double timeout_us, bool soon = false);
  double look_us() const { return look_.us(); }
  // Whether all ranks have published the same record; once all have arrived.
  bool agreed() const;

  // The number of this rank's last publish(), as all ranks count. Its slot, as everything that there is two of, is that
  // number modulo 2.
  std::uint32_t operation() const { return published_; }
  // Whose page, or staging area, has what `rank` shows its peers in this operation: its own. But two ranks swap theirs
  // after every two operations, so that each writes where it read last. Lines that a core has read out of another one's
  // cache are in its own from then on, and who writes them next must get them back first: of two ranks on the cores
  // that docs/algorithms/window.md names, 64 KB took 7.4 us to write where the peer had read, and 1.2 where the writer
  // had.
  std::size_t holder(std::size_t rank, std::uint32_t operation) const {
    return size() == 2 ? (rank + operation / 2) % 2 : rank;
  }
  // Slot and inline data of the last publish(), by rank.
  const Slot& slot(std::size_t rank) const { return pages_[rank]->slots[published_ % 2]; }
  std::uint8_t* inline_data(std::size_t rank) const {
    return pages_[holder(rank, published_)]->inline_data[published_ % 2];
  }

 private:
  std::size_t rank_;
  std::vector<Control*> pages_;
  double spin_us_;
  Look look_;
  std::uint32_t arrivals_ = 0;
  std::uint32_t published_ = 0;
  std::size_t first_unseen_ = 0;
};

}  // namespace commlab
