#include "leaders.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/await.h"
#include "cpu/gather.h"
#include "few.h"
#include "record.h"

namespace commlab::links {
namespace {

using Clock = std::chrono::steady_clock;

// So long a waiter sleeps before it looks whether others take the long way: first, and at most.
constexpr double kFirstSliceUs = 1e3, kLastSliceUs = 10e3;

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

}  // namespace

Leaders::Leaders(std::shared_ptr<Engine> engine, std::uint32_t group, std::uint32_t between,
                 std::vector<std::uint32_t> node, std::size_t me, std::vector<Page*> pages, std::vector<char*> areas,
                 std::size_t area_bytes, double spin_us, double late_us)
    : engine_(std::move(engine)),
      group_(group),
      between_(between),
      node_(std::move(node)),
      me_(me),
      pages_(std::move(pages)),
      areas_(std::move(areas)),
      area_bytes_(area_bytes),
      spin_us_(spin_us),
      late_us_(late_us),
      look_(spin_us) {
  if (me_ >= node_.size() || (node_.size() > 1 && pages_.size() != node_.size()))
    throw std::invalid_argument("a node's ranks need a page each, and this one is among them");
  if (!areas_.empty() && areas_.size() != pages_.size())
    throw std::invalid_argument("all ranks of a node have an area of its window, or none has");
  if (pages_.empty()) return;
  // Numbers of operations begin at 1.
  Page& mine = *pages_[me_];
  mine.arrived.store(0);
  mine.released.store(0);
  mine.sleepers.store(0);
  mine.slots[0] = Slot{0, 0, 0};
}

Leaders::~Leaders() {
  if (run_) engine_->withdraw(run_);
}

double Leaders::spent_us() const { return us_since(begun_); }

void Leaders::begin(const Work& work) {
  const std::lock_guard<std::mutex> held(mutex_);
  if (phase_ != Phase::kIdle) throw std::invalid_argument("an operation of these leaders is under way");
  if (work.bytes() > (!work.shares ? kInlineBytes : areas_.empty() ? 0 : area_bytes_))
    throw std::invalid_argument("a rank of this node has no room for so many numbers");
  work_ = work;
  number_ = static_cast<std::uint32_t>(work.sequence);
  begun_ = Clock::now();
  phase_ = Phase::kGathering;
  if (leads()) return;
  Page& mine = *pages_[me_];
  mine.slots[0].record = record_of(work.signature, work.sequence);
  std::memcpy(numbers_of(me_), work.data, work.bytes());
  mine.arrived.store(number_, std::memory_order_seq_cst);
  // Whoever arrives last wakes the leader, who sleeps on the own page's `arrived`, which counts how often all have.
  if (late_member() >= 0) return;
  Page& leader = *pages_[0];
  leader.arrived.fetch_add(1, std::memory_order_seq_cst);
  if (leader.sleepers.load(std::memory_order_seq_cst)) futex_wake_all(leader.arrived);
}

// Where a member leaves its numbers, and the leader the result.
char* Leaders::numbers_of(std::size_t member) const {
  return work_.shares ? areas_[member] : reinterpret_cast<char*>(pages_[member]->inline_data[0]);
}

// The first member that has not arrived, or -1.
int Leaders::late_member() {
  for (std::size_t member = 1; member < node_.size(); ++member)
    if (pages_[member]->arrived.load(std::memory_order_seq_cst) != number_) return static_cast<int>(member);
  return -1;
}

Leaders::Outcome Leaders::wait(double timeout_us) {
  const std::lock_guard<std::mutex> held(mutex_);
  if (phase_ == Phase::kIdle) throw std::invalid_argument("nothing to wait for");
  return leads() ? wait_as_leader(timeout_us) : wait_as_member(timeout_us);
}

Leaders::Outcome Leaders::turn() {
  if (run_) engine_->withdraw(run_);
  run_.reset();
  phase_ = Phase::kIdle;
  return Outcome::kLongWay;
}

Leaders::Outcome Leaders::wait_as_member(double timeout_us) {
  Page& leader = *pages_[0];
  const auto start = Clock::now();
  const auto late = [&] { return leader.released.load(std::memory_order_seq_cst) == number_ ? -1 : 0; };
  for (double slice_us = kFirstSliceUs;; slice_us = std::min(2 * slice_us, kLastSliceUs)) {
    const double left_us = timeout_us - us_since(start);
    const double wait_us = std::max(0.0, std::min(slice_us, left_us));
    // On its own page: the leader knows for each member whether it sleeps.
    if (await(late, leader.released, pages_[me_]->sleepers, look_, spin_us_, wait_us, /*soon=*/true, 0) < 0) break;
    const bool turns = long_way_taken() || engine_->has_lost(node_[0]);
    if (late() < 0) break;
    if (turns) return turn();
    if (left_us <= slice_us) return Outcome::kLate;
  }
  take_result();
  phase_ = Phase::kIdle;
  return Outcome::kDone;
}

Leaders::Outcome Leaders::wait_as_leader(double timeout_us) {
  const auto start = Clock::now();
  const auto late = [this] { return late_member(); };
  for (double slice_us = kFirstSliceUs; phase_ == Phase::kGathering; slice_us = std::min(2 * slice_us, kLastSliceUs)) {
    const double left_us = timeout_us - us_since(start);
    const double wait_us = std::max(0.0, std::min(slice_us, left_us));
    if (node_.size() == 1 ||
        await(late, pages_[0]->arrived, pages_[0]->sleepers, look_, spin_us_, wait_us, /*soon=*/true, 0) < 0) {
      for (std::size_t member = 1; member < node_.size(); ++member)
        if (pages_[member]->slots[0].record != record_of(work_.signature, work_.sequence)) return turn();
      exchange();
      break;
    }
    const bool taken = long_way_taken();
    const int missing = late_member();
    if (missing < 0) continue;
    if (taken || spent_us() > late_us_ || engine_->has_lost(node_[static_cast<std::size_t>(missing)])) return turn();
    if (left_us <= slice_us) return Outcome::kLate;
  }
  for (double slice_us = kFirstSliceUs; !run_->ended(); slice_us = std::min(2 * slice_us, kLastSliceUs)) {
    const double left_us = timeout_us - us_since(start);
    if (engine_->wait(*run_, std::max(0.0, std::min(slice_us, left_us)) * 1e-6)) break;
    if (long_way_taken() && !run_->ended()) return turn();
    if (const std::vector<std::uint32_t> awaited = engine_->awaited_ranks(*run_); !awaited.empty())
      note(awaited.front());
    if (left_us <= slice_us) return Outcome::kLate;
  }
  if (run_->status.load(std::memory_order_acquire) != Status::kDone) return turn();
  release();
  run_.reset();
  phase_ = Phase::kIdle;
  return Outcome::kDone;
}

// For the members, who are to say for whom they wait.
void Leaders::note(std::uint32_t rank) {
  const std::uint64_t noted = static_cast<std::uint64_t>(number_) << 32 | rank;
  if (!pages_.empty()) __atomic_store_n(&pages_[0]->slots[0].segment, noted, __ATOMIC_RELAXED);
}

// All members are here and agree: the node's sums to the other leaders, and theirs here.
void Leaders::exchange() {
  run_ = std::make_shared<Run>(Run::Kind::kLaunch, between_);
  run_->record = announcement(work_.signature, work_.sequence);
  run_->skips_earlier = true;
  run_->operand.numel = work_.numel;
  run_->operand.op = work_.op;
  run_->operand.divisor = work_.divisor;
  if (work_.shares)
    add_up_shares();
  else
    add_up();
  phase_ = Phase::kBetween;
  engine_->post(run_, /*awaited=*/true, /*here=*/true);
}

void Leaders::add_up() {
  const DType wide = sums_dtype(work_.dtype);
  sums_.resize(work_.numel * dtype_bytes(wide));
  std::vector<const void*> rows{work_.data};
  for (std::size_t member = 1; member < node_.size(); ++member) rows.push_back(numbers_of(member));
  add_node(sums_.data(), rows, work_.dtype, work_.numel, work_.op);
  run_->few = std::make_unique<Few>(work_.few);
  run_->operand.buffer = sums_.data();
  run_->operand.dtype = wide;
}

// In the leader's own area, where the result will be: its members, who have arrived, have read the last one. 16-bit
// sums are divided and rounded to travel, as by the long way (commlab/collectives/routes/hierarchical.py).
void Leaders::add_up_shares() {
  const std::size_t itemsize = dtype_bytes(work_.dtype);
  const bool halves = is_16bit(work_.dtype);
  std::vector<const void*> rows(node_.size());
  for (const Shares::Piece& piece : work_.shares->pieces) {
    for (std::size_t member = 0; member < node_.size(); ++member)
      rows[member] = (member ? numbers_of(member) : work_.data) + piece.start * itemsize;
    void* to = numbers_of(0) + piece.at * itemsize;
    gather_reduce(&to, 1, work_.dtype, rows.data(), rows.size(), work_.dtype, piece.numel, work_.op,
                  halves ? work_.divisor : 1, /*cached=*/true);
  }
  run_->few = std::make_unique<Few>(work_.shares->few);
  run_->operand.buffer = numbers_of(0);
  run_->operand.dtype = work_.dtype;
  if (halves) run_->operand.divisor = 1;
}

// All nodes' sums are here, reduced and divided.
void Leaders::release() {
  if (!work_.shares) {
    if (is_16bit(work_.dtype))
      reduce_loops().narrow(work_.data, reinterpret_cast<const float*>(sums_.data()), work_.numel, work_.dtype, 1);
    else
      std::memcpy(work_.data, sums_.data(), sums_.size());
    if (node_.size() == 1) return;
    std::memcpy(numbers_of(0), work_.data, work_.bytes());
  }
  Page& mine = *pages_[0];
  mine.released.store(number_, std::memory_order_seq_cst);
  const auto asleep = [](Page* page) { return page->sleepers.load(std::memory_order_seq_cst) > 0; };
  if (std::any_of(pages_.begin() + 1, pages_.end(), asleep)) futex_wake_all(mine.released);
  if (work_.shares) take_result();
}

// Out of the leader's page or area.
void Leaders::take_result() {
  const char* result = numbers_of(0);
  if (!work_.shares) {
    std::memcpy(work_.data, result, work_.bytes());
    return;
  }
  const std::size_t itemsize = dtype_bytes(work_.dtype);
  for (const Shares::Piece& piece : work_.shares->pieces)
    std::memcpy(work_.data + piece.start * itemsize, result + piece.at * itemsize, piece.numel * itemsize);
}

std::vector<std::uint32_t> Leaders::peers() {
  const std::lock_guard<std::mutex> held(mutex_);
  std::vector<std::uint32_t> found;
  if (phase_ == Phase::kIdle) return found;
  if (phase_ == Phase::kBetween) return engine_->awaited_ranks(*run_);
  if (!leads()) {
    const std::uint64_t noted = __atomic_load_n(&pages_[0]->slots[0].segment, __ATOMIC_RELAXED);
    found.push_back(noted >> 32 == number_ ? static_cast<std::uint32_t>(noted) : node_[0]);
    return found;
  }
  for (std::size_t member = 1; member < node_.size(); ++member)
    if (pages_[member]->arrived.load(std::memory_order_seq_cst) != number_) found.push_back(node_[member]);
  return found;
}

}  // namespace commlab::links
