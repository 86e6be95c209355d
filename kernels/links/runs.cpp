// What the engine does with runs. Everything here happens with the engine's mutex held, and never waits.
#include <sys/epoll.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "engine.h"
#include "record.h"

namespace commlab::links {

bool Engine::Group::has(std::uint32_t rank) const { return std::find(ranks.begin(), ranks.end(), rank) != ranks.end(); }

void Engine::add_group(std::uint32_t id, std::vector<std::uint32_t> ranks) {
  const std::lock_guard<std::mutex> held(mutex_);
  const auto me = std::find(ranks.begin(), ranks.end(), rank_);
  if (id > kMaxGroup || me == ranks.end() || groups_.count(id))
    throw std::invalid_argument("a group has a number of its own, and this rank in it");
  for (std::uint32_t rank : ranks)
    if (rank >= links_.size()) throw std::invalid_argument("a group names a rank that the job does not have");
  auto group = std::make_unique<Group>();
  group->id = id;
  group->me = static_cast<std::size_t>(me - ranks.begin());
  group->ranks = std::move(ranks);
  inherit_losses(*group);
  groups_[id] = std::move(group);
}

void Engine::remove_group(std::uint32_t id) {
  const std::lock_guard<std::mutex> held(mutex_);
  const auto found = groups_.find(id);
  if (found == groups_.end()) return;
  break_group(*found->second, {Status::kGivenUp, rank_, "the group was closed"});
  settle();
  groups_.erase(found);
  hearsay_.erase(id);
}

void Engine::set_nodes(std::uint32_t id, std::vector<std::vector<std::size_t>> nodes) {
  const std::lock_guard<std::mutex> held(mutex_);
  Group& group = *groups_.at(id);
  std::vector<std::size_t> seen;
  for (const auto& node : nodes) seen.insert(seen.end(), node.begin(), node.end());
  std::sort(seen.begin(), seen.end());
  for (std::size_t rank = 0; rank < std::max(seen.size(), group.ranks.size()); ++rank)
    if (seen.size() != group.ranks.size() || seen[rank] != rank)
      throw std::invalid_argument("each rank of a group is on one node");
  group.nodes = std::move(nodes);
}

Item& Engine::add(Run& run, Item::Kind kind, char* data, std::size_t bytes) {
  Item& item = run.items.emplace_back();
  item.kind = kind;
  item.run = &run;
  item.data = data;
  item.bytes = bytes;
  item.ready = true;
  return item;
}

void Engine::look_at(Link& link) {
  if (link.dirty || !(link.open() || link.holds_frames())) return;
  link.dirty = true;
  dirty_.push_back(&link);
}

void Engine::post_item(const Run& run, Group& group, std::size_t peer, Item& item) {
  Link& link = *links_[group.ranks[peer]];
  link.post(run.kind == Run::Kind::kLaunch ? program_channel(group.id) : message_channel(group.id), item);
  if (item.kind == Item::Kind::kSend || link.holds_frames()) look_at(link);
}

// A run that was posted: a launch waits for those before it.
void Engine::admit(const std::shared_ptr<Run>& run) {
  if (run->ended()) return;  // given up before anybody looked at it
  const auto found = groups_.find(run->group);
  ++under_way_;
  if (found == groups_.end()) return end(*run, {Status::kGivenUp, rank_, "the group was closed"});
  Group& group = *found->second;
  if (group.broken.status != Status::kPending) return end(*run, group.broken);
  if (run->kind != Run::Kind::kLaunch) {
    group.others[run.get()] = run;
    return begin(run);
  }
  group.lane.push_back(run);
  if (group.lane.size() == 1) begin(run);
}

void Engine::begin(const std::shared_ptr<Run>& held) {
  Run& run = *held;
  Group& group = group_of(run);
  judge_later(group);
  if (run.kind == Run::Kind::kMessage) {
    run.phase = Run::Phase::kMoving;
    if (!run.bytes) return end(run, {Status::kDone, 0, ""});
    run.left = 1;
    Item& item = add(run, run.sends ? Item::Kind::kSend : Item::Kind::kWrite, run.data, run.bytes);
    return post_item(run, group, run.peer, item);
  }
  if (run.kind == Run::Kind::kExchange || !run.record.empty()) return announce(run, group);
  move(run, group);
}

// Sends this rank's record, and few numbers behind it, and takes the others'.
void Engine::announce(Run& run, Group& group) {
  run.phase = Run::Phase::kAnnouncing;
  run.left = 0;
  if (run.record.empty()) return next_phase(run);
  const std::size_t ranks = group.ranks.size(), width = run.record.size();
  const bool launch = run.kind == Run::Kind::kLaunch;
  const std::size_t all_bytes = run.operand.numel * run.operand.item_bytes();
  char* table;
  std::size_t row_bytes = width;
  if (launch) {
    row_bytes = (width + (run.few ? run.few->share(all_bytes, group.me).second : 0) + 63) / 64 * 64;
    group.row_bytes = row_bytes;
    if (group.table.size() < ranks * row_bytes) group.table.resize(ranks * row_bytes);
    table = group.table.data();
  } else {
    run.records.resize(ranks * width);
    table = run.records.data();
  }
  std::memcpy(table + group.me * row_bytes, run.record.data(), width);
  run.items.reserve(2 * (ranks - 1));
  run.left = 2 * (ranks - 1);
  if (!run.left) return next_phase(run);
  for (std::size_t shift = 1; shift < ranks; ++shift) {
    const std::size_t peer = (group.me + ranks - shift) % ranks;
    post_item(run, group, peer,
              add(run, launch ? Item::Kind::kAnnounce : Item::Kind::kWrite, table + peer * row_bytes, row_bytes));
  }
  for (std::size_t shift = 1; shift < ranks; ++shift) {
    const std::size_t peer = (group.me + shift) % ranks;
    const auto [start, bytes] = run.few ? run.few->share(all_bytes, peer) : std::pair<std::size_t, std::size_t>();
    if (!launch) {
      post_item(run, group, peer, add(run, Item::Kind::kSend, run.record.data(), width));
      continue;
    }
    Item& item = add(run, Item::Kind::kSend, run.operand.buffer + start, width + std::min(bytes, kFirstBytes));
    item.head = run.record.data();
    item.head_bytes = width;
    post_item(run, group, peer, item);
  }
}

// Everyone's record is here, and this rank's is on its way to everyone.
void Engine::announced(Run& run, Group& group) {
  if (run.kind == Run::Kind::kExchange) return end(run, {Status::kDone, 0, ""});
  const std::size_t ranks = group.ranks.size(), width = run.record.size();
  for (std::size_t rank = 0; rank < ranks; ++rank)
    if (std::memcmp(group.table.data() + rank * group.row_bytes, run.record.data(), width) != 0)
      return end(run, {Status::kDisagree, group.ranks[rank], ""});
  if (!run.few) return move(run, group);
  follow(run, group);
}

void Engine::move(Run& run, Group& group) {
  judge_later(group);
  run.phase = Run::Phase::kMoving;
  if (!run.program || run.program->rows.empty()) return end(run, {Status::kDone, 0, ""});
  run.operand.prepare();
  const Program& program = *run.program;
  run.items.clear();
  run.items.resize(program.rows.size());
  run.waits = program.waits;
  run.left = program.rows.size();
  for (std::uint32_t at = 0; at < program.rows.size(); ++at) {
    const Row& row = program.rows[at];
    if (!run.waits[at]) rows_ready_.emplace_back(&run, at);
    if (row.opcode == Opcode::kFinish) continue;
    Item& item = run.items[at];
    item.kind = row.opcode == Opcode::kSend    ? Item::Kind::kSend
                : row.opcode == Opcode::kWrite ? Item::Kind::kWrite
                                               : Item::Kind::kReduce;
    item.run = &run;
    item.row = at;
    item.data = run.operand.at(row.start);
    item.start = row.start;
    item.bytes = (row.stop - row.start) * run.operand.item_bytes();
    links_[group.ranks[row.peer]]->post(program_channel(group.id), item);
  }
}

void Engine::completed(Item& item) {
  Run& run = *item.run;
  if (item.row != kNoRow) return row_done(run, item.row);
  if (run.skips_earlier && item.kind == Item::Kind::kAnnounce &&
      announced_sequence(item.data) < announced_sequence(run.record.data())) {
    Group& group = group_of(run);
    item.done = 0;
    return post_item(run, group, static_cast<std::size_t>(item.data - group.table.data()) / group.row_bytes, item);
  }
  if (--run.left == 0) next_phase(run);
}

void Engine::next_phase(Run& run) {
  Group& group = group_of(run);
  if (run.phase == Run::Phase::kAnnouncing) return announced(run, group);
  if (run.phase == Run::Phase::kFollowing) {
    add_few(run, group);
    if (run.few->to_each) return share(run, group);
  }
  end(run, {Status::kDone, 0, ""});
}

void Engine::row_done(Run& run, std::uint32_t row) {
  const Program& program = *run.program;
  for (std::uint32_t at = program.first[row]; at < program.first[row + 1]; ++at)
    if (--run.waits[program.after[at]] == 0) rows_ready_.emplace_back(&run, program.after[at]);
  if (--run.left == 0) end(run, {Status::kDone, 0, ""});
}

// Does what has become possible, until nothing more has.
void Engine::settle() {
  for (;;) {
    while (!rows_ready_.empty()) {
      const auto [run, at] = rows_ready_.front();
      rows_ready_.pop_front();
      const Row& row = run->program->rows[at];
      if (row.opcode == Opcode::kFinish) {
        run->operand.finish(row.start, row.stop);
        row_done(*run, at);
        continue;
      }
      const Group& group = group_of(*run);
      Link& link = *links_[group.ranks[row.peer]];
      link.ready(program_channel(group.id), run->items[at]);
      if (row.opcode == Opcode::kSend || link.holds_frames()) look_at(link);
    }
    if (!dirty_.empty()) {
      Link& link = *dirty_.front();
      dirty_.pop_front();
      link.dirty = false;
      if (link.open()) link.pump_out();
      if (link.holds_frames()) link.pump_in();
      update_interest(link);
    } else if (judges_) {
      judge();
    } else {
      break;
    }
  }
  ended_.clear();
}

void Engine::end(Run& run, Failure failure) {
  const Status status = failure.status;
  if (status != Status::kDone && status != Status::kDisagree) {
    for (const auto& link : links_)
      if (link) link->forget(run);
    rows_ready_.erase(
        std::remove_if(rows_ready_.begin(), rows_ready_.end(), [&](const auto& ready) { return ready.first == &run; }),
        rows_ready_.end());
  }
  run.failure = std::move(failure);
  --under_way_;
  const auto found = groups_.find(run.group);
  std::shared_ptr<Run> next;
  if (found != groups_.end()) {
    Group& group = *found->second;
    if (const auto other = group.others.find(&run); other != group.others.end()) {
      ended_.push_back(other->second);
      group.others.erase(other);
    } else if (!group.lane.empty() && group.lane.front().get() == &run) {
      ended_.push_back(group.lane.front());
      group.lane.pop_front();
      if (!group.lane.empty() && group.broken.status == Status::kPending) next = group.lane.front();
    }
  }
  run.status.store(status, std::memory_order_release);
  if (waiting_ > 0) changed_.notify_all();
  if (asleep_) poke();
  if (next) begin(next);
}

// No operation of the group can go on, and none can begin.
void Engine::break_group(Group& group, const Failure& failure) {
  if (group.broken.status != Status::kPending) return;
  group.broken = failure;
  if (failure.status == Status::kLost) tell(group, kLost, {failure.rank}, failure.text);
  while (!group.lane.empty()) end(*group.lane.front(), failure);
  while (!group.others.empty()) end(*group.others.begin()->second, failure);
  for (std::uint32_t rank : group.ranks)
    if (links_[rank]) {
      links_[rank]->discard(program_channel(group.id));
      links_[rank]->discard(message_channel(group.id));
      // What it holds for the group may keep others' frames from being read.
      look_at(*links_[rank]);
    }
}

void Engine::disagrees(Link& link, Item& item, std::size_t sent_bytes) {
  Group& group = group_of(*item.run);
  const std::string text = "rank " + std::to_string(link.peer()) + " sent " + std::to_string(sent_bytes) +
                           " bytes where rank " + std::to_string(rank_) + " expected " +
                           std::to_string(std::min(kFrameBytes, item.bytes - item.done)) + " of " +
                           std::to_string(item.bytes);
  tell(group, kBroken, {}, text);
  break_group(group, {Status::kMismatch, link.peer(), text});
}

std::vector<std::uint32_t> Engine::awaited_peers(const Run& run) {
  const std::lock_guard<std::mutex> held(mutex_);
  std::vector<std::uint32_t> peers;
  if (run.ended() || !groups_.count(run.group)) return peers;
  const Group& group = group_of(run);
  // Receives first: who has sent nothing is who is silent. A send is stuck because its receiver does not read.
  for (const bool sends : {false, true}) {
    for (std::uint32_t peer = 0; peer < group.ranks.size(); ++peer)
      if (group.ranks[peer] != rank_ && links_[group.ranks[peer]]->awaits(run, sends)) peers.push_back(peer);
    if (!peers.empty()) break;
  }
  return peers;
}

std::vector<std::uint32_t> Engine::awaited_ranks(const Run& run) {
  std::vector<std::uint32_t> found = awaited_peers(run);
  const std::lock_guard<std::mutex> held(mutex_);
  const auto group = groups_.find(run.group);
  if (group == groups_.end()) return {};
  for (std::uint32_t& rank : found) rank = group->second->ranks[rank];
  return found;
}

bool Engine::has_lost(std::uint32_t rank) {
  const std::lock_guard<std::mutex> held(mutex_);
  return lost_.count(rank) > 0;
}

void Engine::withdraw(const std::shared_ptr<Run>& run) {
  if (run->ended()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  work(lock);
  if (run->ended()) return;
  const Failure withdrawn{Status::kGivenUp, rank_, "withdrawn"};
  const auto found = groups_.find(run->group);
  if (run->phase <= Run::Phase::kAnnouncing || found == groups_.end())
    end(*run, withdrawn);
  else
    break_group(*found->second, withdrawn);
  settle();
}

void Engine::cancel(const std::shared_ptr<Run>& run) {
  if (run->ended()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  work(lock);
  if (run->ended()) return;
  const auto found = groups_.find(run->group);
  if (found == groups_.end()) return;
  break_group(*found->second, {Status::kGivenUp, rank_, "an operation was abandoned before it had ended"});
  settle();
}

}  // namespace commlab::links
