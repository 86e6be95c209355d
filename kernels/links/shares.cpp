// What the engine does with few numbers, once the announcements that brought them agree (Few in run.h). Everything here
// happens with the engine's mutex held, and never waits.
#include <algorithm>

#include "engine.h"
#include "few.h"

namespace commlab::links {
namespace {

struct Way {
  std::size_t peer;
  Item* item;
};

}  // namespace

// All agree: what had no room in the frames of the announcement.
void Engine::follow(Run& run, Group& group) {
  run.phase = Run::Phase::kFollowing;
  const std::size_t ranks = group.ranks.size(), all_bytes = run.operand.numel * run.operand.item_bytes();
  const auto beyond = [](std::size_t bytes) { return bytes - std::min(bytes, kFirstBytes); };
  std::vector<Way> ways;
  run.items.clear();
  run.items.reserve(2 * ranks);
  for (std::size_t shift = 1; shift < ranks; ++shift) {
    const std::size_t to = (group.me + shift) % ranks, frm = (group.me + ranks - shift) % ranks;
    char* row = group.table.data() + frm * group.row_bytes + run.record.size();
    if (const std::size_t bytes = beyond(run.few->share(all_bytes, group.me).second))
      ways.push_back({frm, &add(run, Item::Kind::kWrite, row + kFirstBytes, bytes)});
    const auto [start, bytes] = run.few->share(all_bytes, to);
    if (beyond(bytes))
      ways.push_back({to, &add(run, Item::Kind::kSend, run.operand.buffer + start + kFirstBytes, beyond(bytes))});
  }
  run.left = ways.size();
  if (ways.empty()) return next_phase(run);
  judge_later(group);
  for (const Way& way : ways) post_item(run, group, way.peer, *way.item);
}

// All that was sent to this rank is here.
void Engine::add_few(Run& run, Group& group) {
  const Operand& operand = run.operand;
  const Few& few = *run.few;
  const std::size_t ranks = group.ranks.size(), all_bytes = operand.numel * operand.item_bytes();
  const auto [start, bytes] = few.share(all_bytes, group.me);
  std::vector<const void*> rows(ranks);
  for (std::size_t rank = 0; rank < ranks; ++rank)
    rows[rank] = group.table.data() + rank * group.row_bytes + run.record.size();
  rows[group.me] = operand.buffer + start;
  if (few.bounds.empty()) {
    add_ranks(operand.buffer + start, rows, group.nodes, operand.dtype, bytes / operand.item_bytes(), operand.op,
              operand.divisor);
    return;
  }
  for (std::size_t owner = 0; owner < ranks; ++owner) {
    const auto [from, part] = few.owned(all_bytes, owner);
    if (!part || (few.to_each && owner != group.me)) continue;
    std::vector<const void*> turns;
    for (std::size_t at = 0; at < ranks; ++at)
      turns.push_back(static_cast<const char*>(rows[(owner + ranks - at) % ranks]) + (from - start));
    add_ranks(operand.buffer + from, turns, {}, operand.dtype, part / operand.item_bytes(), operand.op,
              operand.divisor);
  }
}

// Every rank has reduced its share: to everyone with it.
void Engine::share(Run& run, Group& group) {
  judge_later(group);
  run.phase = Run::Phase::kSharing;
  run.items.clear();
  run.items.reserve(2 * group.ranks.size());
  const std::size_t ranks = group.ranks.size(), all_bytes = run.operand.numel * run.operand.item_bytes();
  const auto [mine, mine_bytes] = run.few->share(all_bytes, group.me);
  std::vector<Way> ways;
  for (std::size_t shift = 1; shift < ranks; ++shift) {
    const std::size_t to = (group.me + shift) % ranks, frm = (group.me + ranks - shift) % ranks;
    const auto [start, bytes] = run.few->share(all_bytes, frm);
    if (bytes) ways.push_back({frm, &add(run, Item::Kind::kWrite, run.operand.buffer + start, bytes)});
    if (mine_bytes) ways.push_back({to, &add(run, Item::Kind::kSend, run.operand.buffer + mine, mine_bytes)});
  }
  run.left = ways.size();
  if (ways.empty()) return next_phase(run);
  for (const Way& way : ways) post_item(run, group, way.peer, *way.item);
}

}  // namespace commlab::links
