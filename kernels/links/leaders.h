// The short way of an allreduce of few numbers where several ranks share a node: a node's ranks add up in shared
// memory, one of them, its leader, exchanges the node's sums with the other leaders, and the result spreads through
// memory.
//
//   member   writes record and numbers into its page, and waits for its leader
//   leader   waits for its members, compares their records with its own, adds up; announces record and sums to the
//            leaders of other nodes (Few), who compare again; writes the result into its page, releases its members
//
// More numbers than a page has room for lie in areas of the window, and travel between leaders as `Shares` say: what
// the announcement's frame has no room for follows once all leaders agree, reduced shares after that (Engine::follow,
// share).
//
// The long way is the group's own announcement, from everyone to everyone. A rank takes it from the start where it does
// anything else than this, and turns to it where the short way can't come to an end. Both give the same bits: few.h,
// and for shares commlab/collectives/routes/leaders.py.
//
// Why no rank can have a result by the short way while another takes the long one, unless a rank is lost. Without one,
// a rank turns to the long way
//   1  for an operation that it has not begun by the short way: then its node has no sums, and no leader gets them;
//   2  as a leader whose members differ from it, or are late: then it has sent no sums;
//   3  as a leader to whom another leader announced something else: all leaders have seen that;
//   4  where it sees that another rank has announced this operation by the long way, which has done so for 1 to 4.
// And whoever waits looks for 4 again and again, so everyone turns. What is left over of a short way given up does no
// harm: words of a page hold the number of the operation that they are for, and so do announcements of leaders. Numbers
// that follow an announcement hold none, and need none: once a leader has seen that all leaders agree, all have sent
// what shows it to every other one, none of 1 to 3 can hold any more, and so none of them, and no member, turns.
//
// If a rank is lost meanwhile, leaders turn in the middle of numbers that move. Then their group ends
// (Engine::withdraw), because what is left over there could be taken for an announcement; and nothing later goes by the
// short way here. The group of all ranks ends with the long way, which awaits the lost rank. Who has a result by then,
// which was complete before, keeps it; its next operation fails. tests/runtime/test_leaders_model.py goes through every
// interleaving of a few ranks and operations.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/sync.h"
#include "engine.h"

namespace commlab::links {

// A rank's page of the window (frames have a Control too).
using Page = commlab::Control;

// More numbers than a page has room for, as leaders exchange them: a node's sums stand share by share, that of the
// first leader first, and a share is the parts of the tensor that its leader's node owns by the long way.
struct Shares {
  struct Piece {
    std::size_t start, at, numel;  // of the tensor; where among the sums
  };
  std::vector<Piece> pieces;
  Few few;  // with bounds
};

class Leaders {
 public:
  enum class Outcome : int { kDone = 0, kLate = 1, kLongWay = 2 };

  // What is done to numbers at `data`. `signature`: a hash of all that ranks must agree on, and `sequence` the number
  // of the operation in its group. `few`: how sums travel between leaders; `shares`: that of more numbers, instead.
  struct Work {
    std::uint64_t signature = 0, sequence = 0;
    char* data = nullptr;
    std::size_t numel = 0;
    DType dtype = DType::kFloat32;
    Op op = Op::kSum;
    double divisor = 1;
    Few few;
    std::shared_ptr<const Shares> shares;

    std::size_t bytes() const { return numel * dtype_bytes(dtype); }
  };

  // `group`: of all ranks; `between`: of the leaders, where this rank is one. `node`: this node's ranks of the job, the
  // leader first; `me`: which of them this rank is. `pages`: theirs, used for nothing else; none where a node has one
  // rank. `areas`: of each of them, `area_bytes` of the window for more numbers; none where no operation has shares.
  // spin_us: as of await(). late_us: a leader whose members are later takes the long way, where everyone waits
  // for everyone, and can say for whom.
  Leaders(std::shared_ptr<Engine> engine, std::uint32_t group, std::uint32_t between, std::vector<std::uint32_t> node,
          std::size_t me, std::vector<Page*> pages, std::vector<char*> areas, std::size_t area_bytes, double spin_us,
          double late_us);
  ~Leaders();
  Leaders(const Leaders&) = delete;
  Leaders& operator=(const Leaders&) = delete;

  // Begins; then wait() helps until the operation has ended, or for timeout_us. One at a time. The numbers are read in
  // begin() and written in wait(), at no other time. A thread may ask for peers() while another one waits.
  void begin(const Work& work);
  Outcome wait(double timeout_us);
  // The ranks of the job for which this one waits.
  std::vector<std::uint32_t> peers();

 private:
  enum class Phase : std::uint8_t { kIdle, kGathering, kBetween, kReleased };

  bool leads() const { return me_ == 0; }
  Outcome wait_as_leader(double timeout_us);
  Outcome wait_as_member(double timeout_us);
  int late_member();
  char* numbers_of(std::size_t member) const;
  void add_up();
  void add_up_shares();
  void exchange();
  void take_result();
  void release();
  void note(std::uint32_t rank);
  Outcome turn();
  double spent_us() const;
  bool long_way_taken() { return engine_->announced_by_others(group_, work_.sequence); }

  std::shared_ptr<Engine> engine_;
  const std::uint32_t group_, between_;
  const std::vector<std::uint32_t> node_;
  const std::size_t me_;
  const std::vector<Page*> pages_;
  const std::vector<char*> areas_;
  const std::size_t area_bytes_;
  const double spin_us_, late_us_;
  std::mutex mutex_;  // of all below: held while an operation is begun or moved on
  Look look_;
  Work work_;
  std::uint32_t number_ = 0;  // of the operation, as pages hold it
  Phase phase_ = Phase::kIdle;
  std::chrono::steady_clock::time_point begun_;
  std::vector<char> sums_;
  std::shared_ptr<Run> run_;
};

}  // namespace commlab::links
