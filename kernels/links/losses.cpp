// What the loss of a rank means. Everything here happens with the engine's mutex held, and never waits.
//
// A connection that ends is no failure by itself: a rank may end right after its last operation, while others still
// complete this operation out of bytes that have arrived. Who fails is who awaits something of the lost rank, and
// nobody else:
//
//   - What has arrived counts as received, also where nobody could take it yet (Link::awaits).
//   - A group breaks once a run of it, under way or begun later, awaits the lost rank.
//   - Then, and only then, the members of the group are told. Whoever awaits one of those who failed fails too, of the
//     same loss, and tells in turn. So nobody waits for ever: of the ranks that an operation waits for, each goes on,
//     or fails and tells, or has not begun yet, and will do one of both.
//
// Runs are judged in settle(), when all else has been done, so that none is ended in the middle of its own callbacks.
#include <algorithm>
#include <cstring>

#include "engine.h"

namespace commlab::links {
namespace {

// More groups than any job breaks before one of its ranks has made them: a peer that names so many is out of its mind.
constexpr std::size_t kMaxHearsay = 1 << 16;

}  // namespace

// The members of the group learn that a run of it has failed here. `head`: what stands between group and text.
void Engine::tell(const Group& group, std::uint32_t kind, const std::vector<std::uint32_t>& head,
                  const std::string& text) {
  std::string payload(reinterpret_cast<const char*>(&group.id), sizeof(group.id));
  payload.append(reinterpret_cast<const char*>(head.data()), head.size() * sizeof(head[0]));
  payload += text.substr(0, kControlBytes - payload.size());
  for (const std::uint32_t rank : group.ranks) {
    Link* link = links_[rank].get();
    if (!link || !link->open() || link->leaving) continue;
    link->post_control(kind, payload.data(), payload.size());
    look_at(*link);
  }
}

void Engine::controlled(Link& link, std::uint32_t kind, const char* payload, std::size_t bytes) {
  if (kind == kLeaving) {
    link.leaving = true;
    return;
  }
  const auto malformed = [&](const std::string& reason) {
    link.close();
    failed(link, reason);
  };
  std::uint32_t numbers[2] = {};
  const std::size_t head = (kind == kLost ? 2 : 1) * sizeof(numbers[0]);
  if ((kind != kLost && kind != kBroken) || bytes < head)
    return malformed("a control frame of unknown kind " + std::to_string(kind));
  std::memcpy(numbers, payload, head);
  std::string text(payload + head, bytes - head);
  if (hearsay_.size() >= kMaxHearsay)
    return malformed("words about more than " + std::to_string(kMaxHearsay) + " groups that nobody knows");
  if (kind == kLost && numbers[1] >= links_.size())
    return malformed("words about rank " + std::to_string(numbers[1]) + ", which the job does not have");
  if (kind == kLost) return told_of_loss(link, numbers[0], numbers[1], std::move(text));
  const Failure mismatch{Status::kMismatch, link.peer(), std::move(text)};
  if (const auto found = groups_.find(numbers[0]); found != groups_.end())
    break_group(*found->second, mismatch);
  else
    hearsay_[numbers[0]].emplace(link.peer(), mismatch);
}

// A run of the peer has failed of the loss of `rank`.
void Engine::told_of_loss(Link& link, std::uint32_t id, std::uint32_t rank, std::string text) {
  Failure failure{Status::kLost, rank, std::move(text)};
  if (rank == rank_)
    failure = {Status::kLost, link.peer(),
               "rank " + std::to_string(link.peer()) + " has given this rank up: " + failure.text};
  else
    told_.emplace(link.peer(), failure);
  const auto found = groups_.find(id);
  if (found == groups_.end()) {
    hearsay_[id].emplace(link.peer(), failure);
    if (rank != rank_) hearsay_[id].emplace(rank, failure);
    return;
  }
  add_loss(*found->second, link.peer(), failure);
  if (rank == rank_ || !found->second->has(rank)) return;
  add_loss(*found->second, rank, failure);
  // The other rank's connection to here may be whole, and hold what a run awaits.
  doubted_.push_back(links_[rank].get());
}

void Engine::failed(Link& link, const std::string& reason) {
  lost_.emplace(link.peer(), Failure{Status::kLost, link.peer(), reason});
  for (auto& [id, group] : groups_)
    if (group->has(link.peer())) inherit_losses(*group);
}

// What the group has to know of ranks that were lost before it was made, or just now.
void Engine::inherit_losses(Group& group) {
  if (const auto found = hearsay_.find(group.id); found != hearsay_.end()) {
    for (const auto& [rank, failure] : found->second)
      if (group.has(rank)) add_loss(group, rank, failure);
    hearsay_.erase(found);
  }
  for (const auto& [rank, failure] : lost_) {
    if (!group.has(rank)) continue;
    // Who has told of a rank that did end, and has then ended too, has ended because of that.
    const auto told = told_.find(rank);
    const bool known = told != told_.end() && lost_.count(told->second.rank) && !links_[told->second.rank]->leaving;
    add_loss(group, rank, known && group.has(told->second.rank) ? told->second : failure);
  }
}

// From now on, whoever awaits `rank` fails: the first reason stays.
void Engine::add_loss(Group& group, std::uint32_t rank, const Failure& failure) {
  const auto known = [&](const auto& loss) { return loss.first == rank; };
  if (std::any_of(group.losses.begin(), group.losses.end(), known)) return;
  const bool member = group.has(failure.rank);
  group.losses.emplace_back(rank, member ? failure : Failure{failure.status, rank, failure.text});
  judge_later(group);
}

// A run of the group may await ranks that it did not await before, or that are lost now.
void Engine::judge_later(const Group& group) {
  if (!group.losses.empty() && group.broken.status == Status::kPending) judges_ = true;
}

// Breaks the groups of which a run awaits a rank that is lost.
void Engine::judge() {
  while (!doubted_.empty()) {
    Link& link = *doubted_.front();
    doubted_.pop_front();
    link.take_arrived();
    look_at(link);
  }
  // What was taken may have been all that a run waited for.
  if (!dirty_.empty() || !rows_ready_.empty()) return;
  judges_ = false;
  for (auto& [id, group] : groups_) {
    if (group->broken.status != Status::kPending) continue;
    for (const auto& [rank, failure] : group->losses) {
      const auto hurt = [&](const Run& run) { return awaits(run, *group, rank); };
      if ((!group->lane.empty() && hurt(*group->lane.front())) ||
          std::any_of(group->others.begin(), group->others.end(),
                      [&](const auto& each) { return hurt(*each.first); })) {
        break_group(*group, failure);
        break;
      }
    }
  }
}

// Whether the run, which has begun, needs the rank for anything more, now or in its later phases.
bool Engine::awaits(const Run& run, const Group& group, std::uint32_t rank) const {
  const Link* link = links_[rank].get();
  if (!link) return false;
  if (link->awaits(run, true) || link->awaits(run, false)) return true;
  if (run.kind != Run::Kind::kLaunch || run.phase != Run::Phase::kAnnouncing) return false;
  // The rank has announced the operation and is not there any more, others have yet to announce it: who waited for them
  // first might wait for long, and in vain.
  const std::size_t peer =
      static_cast<std::size_t>(std::find(group.ranks.begin(), group.ranks.end(), rank) - group.ranks.begin());
  if (std::memcmp(group.table.data() + peer * group.row_bytes, run.record.data(), run.record.size()) != 0)
    return false;  // all will see that they disagree
  std::size_t early = link->early_frames(program_channel(group.id));
  if (run.few) {
    const std::size_t all_bytes = run.operand.numel * run.operand.item_bytes();
    const std::size_t mine = run.few->share(all_bytes, group.me).second;
    const std::size_t theirs = run.few->share(all_bytes, peer).second;
    const auto frames_beyond = [](std::size_t bytes) { return frames_of(bytes - std::min(bytes, kFirstBytes)); };
    if (frames_beyond(theirs) || (run.few->to_each && mine)) return true;  // something is still to be sent there
    return frames_beyond(mine) + (run.few->to_each ? frames_of(theirs) : 0) > early;
  }
  if (!run.program) return false;
  for (const Row& row : run.program->rows) {
    if (row.opcode == Opcode::kFinish || row.peer != peer) continue;
    const std::size_t frames = frames_of((row.stop - row.start) * run.operand.item_bytes());
    if (row.opcode == Opcode::kSend || frames > early) return true;
    early -= frames;
  }
  return false;
}

}  // namespace commlab::links
