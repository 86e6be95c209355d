// One connection to one peer: bytes to frames and back. It never waits, and knows of operations only what it must:
// items, each so many bytes that go out or come in, in the order in which they were posted to a channel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "frame.h"

namespace commlab::links {

class Run;
struct Channel;

constexpr std::uint32_t kNoRow = 0xffffffffu;

// So many bytes to or from one peer, as part of a run.
struct Item {
  enum class Kind : std::uint8_t {
    kSend,
    kWrite,     // arrives at `data`
    kReduce,    // arrives in a scratch, and is combined with numbers `start` and on of the run's buffer
    kAnnounce,  // arrives at `data`, in one frame of any length; what is longer than `bytes` is dropped
  };
  Kind kind = Kind::kSend;
  bool ready = false;
  std::uint32_t row = kNoRow;  // of the run's program
  Run* run = nullptr;
  char* data = nullptr;
  std::size_t bytes = 0, done = 0;
  std::size_t start = 0;
  const char* head = nullptr;  // of a kSend in one frame: goes out before `data`; counts in `bytes`
  std::size_t head_bytes = 0;
};

// A frame that came before anybody had asked for it, while somebody waited for what is behind it.
struct Early {
  Header header;
  std::vector<char> payload;
};

// The items of one connection that belong to one group.
struct Channel {
  std::uint32_t id = 0, sent = 0, received = 0;  // frames
  std::deque<Item*> out, in;
  std::deque<Early> early;
  bool queued = false;    // among the connection's channels that have something to send
  bool discards = false;  // its group is given up: what still arrives means nothing
};

// In so many frames the bytes travel.
constexpr std::size_t frames_of(std::size_t bytes) { return (bytes + kFrameBytes - 1) / kFrameBytes; }

class Link;

// Who is told what happens on a connection. None of these calls may come back to the link but for `post`.
class Events {
 public:
  virtual ~Events() = default;
  virtual void completed(Item& item) = 0;
  // The peer sent so many bytes where `item` is what comes next; the frame is dropped.
  virtual void disagrees(Link& link, Item& item, std::size_t sent_bytes) = 0;
  virtual void controlled(Link& link, std::uint32_t kind, const char* payload, std::size_t bytes) = 0;
  // The connection is closed; what arrived before is still given to those who ask for it.
  virtual void failed(Link& link, const std::string& reason) = 0;
};

class Link {
 public:
  // Takes over `fd`, a connected stream socket, and makes it non-blocking. `checks`: payloads carry a checksum.
  Link(Events& events, std::uint32_t peer, int fd, bool checks);
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // Queues an item behind the others of its channel and direction. It moves once it is ready.
  void post(std::uint32_t channel, Item& item);
  // The item is ready now; it may be posted before.
  void ready(std::uint32_t channel, Item& item);
  void post_control(std::uint32_t kind, const void* payload, std::size_t bytes);
  // Takes a run's items out. Its memory is not touched from now on.
  void forget(const Run& run);
  void discard(std::uint32_t channel);
  // Whether something of the run is still to be sent here, or has not arrived yet.
  bool awaits(const Run& run, bool sends) const;
  // Frames of the channel that have arrived and that nobody has asked for, or could take, yet.
  std::size_t early_frames(std::uint32_t channel) const;
  // The payload of the first of them; null: there is none.
  const std::vector<char>* first_early(std::uint32_t channel) const;

  // Sends and receives what can be sent and received now.
  void pump_out();
  void pump_in();
  // The peer has closed its end: read to the end, whoever wants it.
  void drain();
  // Reads what has arrived by now, whoever wants it.
  void take_arrived();
  // Nothing is sent or read here any more.
  void close();

  bool open() const { return fd_ >= 0; }
  int fd() const { return fd_; }
  std::uint32_t peer() const { return peer_; }
  bool wants_out() const { return stuck_; }
  // A frame is at hand that nobody wants yet: reading more would only fill memory.
  bool blocked() const { return blocked_; }
  // Frames are at hand that an item which is posted now, or ready now, may want.
  bool holds_frames() const { return blocked_ || early_ > 0; }

  std::uint32_t interest = 0;  // what epoll was asked for
  bool dirty = false;          // among the links that the engine will pump
  bool leaving = false;        // the peer closes in good order

 private:
  enum class Sink : std::uint8_t { kNone, kItem, kEarly, kControl, kDiscard };

  Channel& channel(std::uint32_t id);
  void sendable(Channel& channel);
  bool load_frame();
  void frame_sent();
  bool consume();
  bool begin_frame();
  void take(const char* from, std::size_t bytes);
  void take_reduce(const char* from, std::size_t bytes);
  bool end_frame();
  bool feed_early();
  bool read_more();
  void fail(const std::string& reason);
  bool others_wait(const Channel& channel) const;

  Events& events_;
  const std::uint32_t peer_;
  int fd_;
  const bool checks_;
  std::unordered_map<std::uint32_t, std::unique_ptr<Channel>> channels_;
  std::size_t posted_in_ = 0, early_ = 0;

  // The frame on its way out: header, head of the item, payload.
  std::deque<std::vector<char>> control_;
  std::deque<Channel*> sendable_;
  Header out_header_{};
  const char* out_head_ = nullptr;
  const char* out_data_ = nullptr;
  std::size_t out_head_bytes_ = 0, out_data_bytes_ = 0, out_sent_ = 0, out_bytes_ = 0;
  Channel* out_channel_ = nullptr;
  Item* out_item_ = nullptr;
  std::vector<char> out_own_;  // what is sent from here, where no item stands behind the frame
  bool stuck_ = false;

  // The frame on its way in.
  std::vector<char> inbox_;
  std::size_t inbox_at_ = 0, inbox_end_ = 0;
  std::uint64_t read_ = 0;  // bytes, from the beginning
  Sink sink_ = Sink::kNone;
  Header in_header_{};
  std::size_t in_left_ = 0;
  std::uint32_t in_check_ = 0;
  Channel* in_channel_ = nullptr;
  Item* in_item_ = nullptr;
  std::vector<char> in_own_;  // an early frame's payload, or a control frame's
  std::vector<char> scratch_;
  std::size_t carry_ = 0;  // bytes of half a number at the beginning of the scratch
  bool blocked_ = false, draining_ = false;
};

}  // namespace commlab::links
