// The engine of a process: the connections to all other ranks, and the operations of all groups that run over them.
//
// Whoever waits helps: a thread that waits for an operation runs the loop itself. Only while operations are under way
// and nobody waits does the engine's own thread run it. Both sleep in epoll until there is something to do, a caller
// after a short look; neither knows Python.
//
//   mutex_     held by whoever looks at runs, groups or links; never while asleep
//   driving_   one thread at a time runs the loop; others sleep until their run has ended or the loop is free
//   posted_    where a run is left for a thread that is busy in the loop, so that nobody waits to post
#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/look.h"
#include "link.h"
#include "run.h"

namespace commlab::links {

class Engine final : public Events {
 public:
  // `fds[r]`: a connected stream socket to rank r of the job, which the engine takes over; -1 for `rank` itself.
  // `checks`: payloads carry a checksum. `look_us`: so long at most a caller that waits looks again at once before it
  // sleeps; the engine's own thread never does.
  Engine(std::uint32_t rank, const std::vector<int>& fds, bool checks, double look_us);
  ~Engine() override;

  // A group of ranks of the job, with a number that no other group of any of its ranks has.
  void add_group(std::uint32_t id, std::vector<std::uint32_t> ranks);
  void remove_group(std::uint32_t id);
  // The ranks of the group on each node: few numbers are added node by node from now on.
  void set_nodes(std::uint32_t id, std::vector<std::vector<std::size_t>> nodes);

  // Starts a run; launches of a group run one after the other. `awaited`: the caller goes on to wait for it. `here`:
  // the caller has the time to send what can be sent now; else the thread does it.
  void post(std::shared_ptr<Run> run, bool awaited, bool here);
  // Helps until the run has ended, or for `timeout_s`, or until a signal arrives; whether it has ended.
  bool wait(const Run& run, double timeout_s);
  // The ranks that the run waits for, as its group counts them, or the job.
  std::vector<std::uint32_t> awaited_peers(const Run& run);
  std::vector<std::uint32_t> awaited_ranks(const Run& run);
  // Gives up a run that has not ended: from now on its memory is not touched, and its group is of no more use.
  void cancel(const std::shared_ptr<Run>& run);
  // The same of a launch that skips earlier ones, on all ranks: the group stays where this rank has not got beyond the
  // announcement. Beyond it, what others have sent could be taken for the next announcement.
  void withdraw(const std::shared_ptr<Run>& run);
  // Whether a rank has announced operation `sequence` of the group, or an earlier one, and nobody here has asked for
  // it; or the group can't go on. Reads what has arrived by now.
  bool announced_by_others(std::uint32_t group, std::uint64_t sequence);
  // Whether nothing more comes from this rank of the job, as far as is known here.
  bool has_lost(std::uint32_t rank);
  // Tells the peers that this rank leaves in good order, and waits up to `timeout_s` for what is still to be sent.
  void leave(double timeout_s);

  std::size_t ranks() const { return links_.size(); }

 private:
  struct Group {
    std::uint32_t id;
    std::vector<std::uint32_t> ranks;
    std::size_t me;
    std::vector<std::vector<std::size_t>> nodes;
    std::deque<std::shared_ptr<Run>> lane;
    std::unordered_map<const Run*, std::shared_ptr<Run>> others;  // messages and exchanges
    Failure broken;
    // Ranks from which nothing more comes, and how a run ends that awaits one; in the order in which they were noticed,
    // because whoever ends later may have ended because of an earlier loss.
    std::vector<std::pair<std::uint32_t, Failure>> losses;
    std::vector<char> table;  // what everyone announced, a row for each rank
    std::size_t row_bytes = 0;
    bool has(std::uint32_t rank) const;
  };

  void completed(Item& item) override;
  void disagrees(Link& link, Item& item, std::size_t sent_bytes) override;
  void controlled(Link& link, std::uint32_t kind, const char* payload, std::size_t bytes) override;
  void failed(Link& link, const std::string& reason) override;

  // engine.cpp: who runs the loop
  void drive(std::unique_lock<std::mutex>& lock, double timeout_s, const Run* until);
  int events_within(double timeout_s, bool looks, epoll_event* events);
  void work(std::unique_lock<std::mutex>& lock);
  void serve();
  void poke();
  void hand_over(std::unique_lock<std::mutex>& lock);
  void update_interest(Link& link, bool quiet = false);
  bool busy() const;

  // runs.cpp: what the loop does; all with mutex_ held
  void admit(const std::shared_ptr<Run>& run);
  void begin(const std::shared_ptr<Run>& run);
  void announce(Run& run, Group& group);
  void announced(Run& run, Group& group);
  void move(Run& run, Group& group);
  void next_phase(Run& run);
  void row_done(Run& run, std::uint32_t row);
  void settle();
  void end(Run& run, Failure failure);
  void break_group(Group& group, const Failure& failure);
  void tell(const Group& group, std::uint32_t kind, const std::vector<std::uint32_t>& head, const std::string& text);
  Item& add(Run& run, Item::Kind kind, char* data, std::size_t bytes);
  void post_item(const Run& run, Group& group, std::size_t peer, Item& item);
  void look_at(Link& link);
  Group& group_of(const Run& run) { return *groups_.at(run.group); }

  // shares.cpp: few numbers behind an announcement; all with mutex_ held
  void follow(Run& run, Group& group);
  void add_few(Run& run, Group& group);
  void share(Run& run, Group& group);

  // losses.cpp: which runs fail of a rank that is lost; all with mutex_ held
  void told_of_loss(Link& link, std::uint32_t group, std::uint32_t rank, std::string text);
  void add_loss(Group& group, std::uint32_t rank, const Failure& failure);
  void inherit_losses(Group& group);
  void judge_later(const Group& group);
  void judge();
  bool awaits(const Run& run, const Group& group, std::uint32_t rank) const;

  const std::uint32_t rank_;
  Look look_;
  std::vector<std::unique_ptr<Link>> links_;
  std::map<std::uint32_t, Failure> lost_;  // ranks whose connection has ended
  std::map<std::uint32_t, Failure> told_;  // by a rank: the first loss of which it has told
  // What was told of groups that this rank has not made yet, by the group and by who can't go on.
  std::map<std::uint32_t, std::map<std::uint32_t, Failure>> hearsay_;
  std::deque<Link*> doubted_;  // somebody says that the peer is lost: what it has sent is taken first
  bool judges_ = false;        // a run may await a rank that is lost
  std::unordered_map<std::uint32_t, std::unique_ptr<Group>> groups_;
  std::deque<std::pair<Run*, std::uint32_t>> rows_ready_;
  std::deque<Link*> dirty_;
  std::vector<std::shared_ptr<Run>> ended_;

  std::mutex mutex_;
  std::condition_variable changed_, thread_wanted_;
  bool driving_ = false, thread_drives_ = false, stopping_ = false;
  std::size_t waiting_ = 0, under_way_ = 0;
  std::atomic<bool> awake_{false}, asleep_{false};
  std::mutex posted_mutex_;
  std::deque<std::shared_ptr<Run>> posted_;
  std::atomic<std::size_t> posted_count_{0};
  std::thread thread_;
  int epoll_ = -1, wake_ = -1;
};

}  // namespace commlab::links
