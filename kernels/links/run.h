// An operation under way on one rank, as the engine sees it: what it announces to the others, and what it moves then.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "frame.h"
#include "link.h"
#include "program.h"

namespace commlab::links {

enum class Status : int {
  kPending = 0,
  kDone = 1,
  kDisagree = 2,  // ranks announced different operations; nothing was moved
  kLost = 3,      // a rank is gone
  kMismatch = 4,  // what arrived does not fit
  kGivenUp = 5,   // an operation before it was abandoned half-way
};

// How a run ended that did not end well.
struct Failure {
  Status status = Status::kPending;  // pending: none
  std::uint32_t rank = 0;            // of the job: who is lost, or who sent what does not fit
  std::string text;
};

// Few numbers, which travel behind the announcement. Share r, `share_bytes` long but for the last ones, goes to rank r,
// is reduced there and sent to all; or, where the shares are not `to_each`, everybody gets all numbers and reduces
// them.
struct Few {
  std::size_t share_bytes = 0;
  bool to_each = false;
  // Shares of any length instead: where in the buffer each rank's begins, in bytes, and where the last one ends. The
  // numbers of share r are then added as commlab/schedules/direct.py does: rank r's, then those of r - 1, r - 2, ...
  std::vector<std::size_t> bounds = {};

  std::pair<std::size_t, std::size_t> owned(std::size_t all, std::size_t rank) const {
    if (!bounds.empty()) return {bounds[rank], bounds[rank + 1] - bounds[rank]};
    const std::size_t start = std::min(rank * share_bytes, all);
    return {start, std::min(share_bytes, all - start)};
  }
  // Where what goes to `rank` begins, and its bytes; `all`: of all numbers.
  std::pair<std::size_t, std::size_t> share(std::size_t all, std::size_t rank) const {
    return to_each ? owned(all, rank) : std::pair<std::size_t, std::size_t>(0, all);
  }
};

// So many bytes of a share travel in the frame of the announcement. The others follow once all are known to agree.
constexpr std::size_t kFirstBytes = kFrameBytes - 4096;

class Run {
 public:
  enum class Kind : std::uint8_t {
    kMessage,   // to or from one peer
    kExchange,  // everyone's record to everyone
    kLaunch,    // an operation of the group, in order: announce, compare, then move the numbers
  };
  enum class Phase : std::uint8_t { kWaiting, kAnnouncing, kFollowing, kSharing, kMoving };

  Run(Kind kind, std::uint32_t group) : kind(kind), group(group) {}

  bool ended() const { return status.load(std::memory_order_acquire) != Status::kPending; }

  const Kind kind;
  const std::uint32_t group;
  std::atomic<Status> status{Status::kPending};
  Failure failure;  // once it has ended

  // kMessage
  bool sends = false;
  std::uint32_t peer = 0;  // rank of the group
  char* data = nullptr;
  std::size_t bytes = 0;

  // kExchange, and a kLaunch that announces itself
  std::string record;
  std::vector<char> records;  // everyone's, in rank order, once they have arrived

  // kLaunch
  std::unique_ptr<Few> few;
  bool skips_earlier = false;  // an announcement of an earlier operation is left over of one that was withdrawn
  std::shared_ptr<const Program> program;
  Operand operand;

  // The engine's own.
  Phase phase = Phase::kWaiting;
  std::vector<Item> items;
  std::vector<std::uint32_t> waits;  // for each row, how many rows it still waits for
  std::size_t left = 0;              // items, or rows, that are not done
};

}  // namespace commlab::links
