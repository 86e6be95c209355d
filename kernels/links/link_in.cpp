#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "crc32c.h"
#include "link.h"
#include "run.h"

namespace commlab::links {
namespace {

// What is read and reduced at a time: of the first- and second-level caches.
constexpr std::size_t kPiece = 128 * 1024;
// After so many the other connections get their turn.
constexpr std::size_t kReadsAtOnce = 8;
// More channels than any program makes: a peer that names so many is out of its mind.
constexpr std::size_t kMaxChannels = 1 << 16;

}  // namespace

void Link::fail(const std::string& reason) {
  close();
  events_.failed(*this, reason);
}

bool Link::others_wait(const Channel& channel) const { return draining_ || posted_in_ > channel.in.size(); }

void Link::pump_in() {
  if (fd_ < 0) {
    feed_early();
    return;
  }
  blocked_ = false;
  for (std::size_t reads = 0; fd_ >= 0 && consume() && fd_ >= 0; ++reads)
    if (reads == kReadsAtOnce || !read_more()) return;
}

void Link::drain() {
  draining_ = true;
  blocked_ = false;
  while (fd_ >= 0 && consume() && fd_ >= 0 && read_more()) {
  }
}

void Link::take_arrived() {
  int arrived = 0;
  if (fd_ < 0 || draining_ || ioctl(fd_, FIONREAD, &arrived) != 0) return;
  const std::uint64_t stop = read_ + static_cast<std::uint64_t>(arrived);
  draining_ = true;
  blocked_ = false;
  while (fd_ >= 0 && consume() && fd_ >= 0 && read_ < stop && read_more()) {
  }
  draining_ = false;
}

// Takes all whole pieces out of the inbox. False: nobody wants the next frame yet, or the link has failed.
bool Link::consume() {
  if (!feed_early()) return false;
  while (fd_ >= 0) {
    if (sink_ == Sink::kNone) {
      // Again after each frame: what came early may have been wanted while that frame was on its way.
      if (early_ && !feed_early()) return false;
      if (inbox_end_ - inbox_at_ < kHeaderBytes) return true;
      std::memcpy(&in_header_, inbox_.data() + inbox_at_, kHeaderBytes);
      if (!begin_frame()) {
        blocked_ = fd_ >= 0;
        return false;
      }
      inbox_at_ += kHeaderBytes;
      in_left_ = in_header_.length;
      in_check_ = 0;
    }
    const std::size_t bytes = std::min(inbox_end_ - inbox_at_, in_left_);
    if (bytes) {
      inbox_at_ += bytes;
      take(inbox_.data() + inbox_at_ - bytes, bytes);
    }
    if (in_left_) return true;
    if (!end_frame()) return false;
  }
  return false;
}

// Says where the payload goes. False: not now, or the header makes no sense.
bool Link::begin_frame() {
  const Header& header = in_header_;
  if (header.length > kFrameBytes) {
    fail("a frame of " + std::to_string(header.length) + " bytes, which no rank sends");
    return false;
  }
  in_item_ = nullptr;
  if (header.channel == kControl) {
    if (header.length > kControlBytes) {
      fail("a control frame of " + std::to_string(header.length) + " bytes");
      return false;
    }
    sink_ = Sink::kControl;
    in_own_.clear();
    return true;
  }
  if (channels_.size() >= kMaxChannels && !channels_.count(header.channel)) {
    fail("frames of more than " + std::to_string(kMaxChannels) + " channels");
    return false;
  }
  Channel& to = channel(header.channel);
  if (header.sequence != to.received + to.early.size()) {
    fail("frame " + std::to_string(header.sequence) + " of channel " + std::to_string(to.id) + " where frame " +
         std::to_string(to.received + to.early.size()) + " was due");
    return false;
  }
  in_channel_ = &to;
  if (to.discards) {
    sink_ = Sink::kDiscard;
  } else if (to.early.empty() && !to.in.empty() && to.in.front()->ready) {
    Item& item = *to.in.front();
    in_item_ = &item;
    sink_ = Sink::kItem;
    if (item.kind != Item::Kind::kAnnounce && header.length != std::min(kFrameBytes, item.bytes - item.done)) {
      in_item_ = nullptr;
      sink_ = Sink::kDiscard;
      events_.disagrees(*this, item, header.length);
    }
  } else if (others_wait(to)) {
    sink_ = Sink::kEarly;
    in_own_.clear();
    in_own_.reserve(header.length);
  } else {
    return false;
  }
  return true;
}

// `from`: in the inbox, or already where the payload belongs.
void Link::take(const char* from, std::size_t bytes) {
  if (!bytes) return;
  if (checks_) in_check_ = crc32c(in_check_, from, bytes);
  in_left_ -= bytes;
  switch (sink_) {
    case Sink::kItem: {
      Item& item = *in_item_;
      if (item.kind == Item::Kind::kReduce) return take_reduce(from, bytes);
      const std::size_t room = item.bytes - std::min(item.bytes, item.done);
      char* to = item.data + item.done;
      if (from != to && room) std::memcpy(to, from, std::min(bytes, room));
      item.done += std::min(bytes, room);
      return;
    }
    case Sink::kEarly:
    case Sink::kControl: in_own_.insert(in_own_.end(), from, from + bytes); return;
    default: return;
  }
}

void Link::take_reduce(const char* from, std::size_t bytes) {
  Item& item = *in_item_;
  const Operand& operand = item.run->operand;
  const std::size_t item_bytes = operand.item_bytes();
  const auto reduce = [&](const char* numbers, std::size_t count) {
    operand.reduce(item.start + item.done / item_bytes, numbers, count);
    item.done += count * item_bytes;
  };
  if (from != scratch_.data() + carry_) {  // in the inbox: only halves of numbers go through the scratch
    if (scratch_.empty()) scratch_.resize(kPiece + 8);
    while (carry_ && bytes) {
      scratch_[carry_++] = *from++;
      --bytes;
      if (carry_ == item_bytes) {
        reduce(scratch_.data(), 1);
        carry_ = 0;
      }
    }
    if (bytes >= item_bytes) reduce(from, bytes / item_bytes);
    const std::size_t rest = bytes % item_bytes;
    if (rest) std::memcpy(scratch_.data() + carry_, from + bytes - rest, rest);
    carry_ += rest;
    return;
  }
  const std::size_t all = carry_ + bytes;
  if (all >= item_bytes) reduce(scratch_.data(), all / item_bytes);
  carry_ = all % item_bytes;
  std::memmove(scratch_.data(), scratch_.data() + all - carry_, carry_);
}

bool Link::end_frame() {
  const Sink sink = sink_;
  sink_ = Sink::kNone;
  if (checks_ && (in_check_ ^ crc32c(0, &in_header_, 12)) != in_header_.check) {
    in_item_ = nullptr;
    fail("a frame of " + std::to_string(in_header_.length) +
         " bytes arrived corrupted: its CRC32C is not that which its sender computed");
    return false;
  }
  if (sink == Sink::kControl) {
    const std::vector<char> payload = std::move(in_own_);
    events_.controlled(*this, in_header_.sequence, payload.data(), payload.size());
    return fd_ >= 0;
  }
  if (sink == Sink::kEarly) {
    if (in_channel_->discards) {
      ++in_channel_->received;
    } else {
      in_channel_->early.push_back({in_header_, std::move(in_own_)});
      ++early_;
    }
    return true;
  }
  ++in_channel_->received;
  if (sink != Sink::kItem) return true;
  Item& item = *in_item_;
  in_item_ = nullptr;
  if (item.kind == Item::Kind::kAnnounce || item.done == item.bytes) {
    in_channel_->in.pop_front();
    --posted_in_;
    events_.completed(item);
  }
  return fd_ >= 0;
}

// Gives frames that came early to those who want them now, also when the link is closed. False: it is.
bool Link::feed_early() {
  if (!early_ || sink_ != Sink::kNone) return fd_ >= 0;
  for (bool found = true; found && early_;) {
    found = false;
    // Who is told of a completed item may post to a new channel: look again from the start.
    for (auto& [id, each] : channels_) {
      Channel& from = *each;
      if (from.early.empty() || from.in.empty() || !from.in.front()->ready) continue;
      found = true;
      const Early frame = std::move(from.early.front());
      from.early.pop_front();
      --early_;
      const std::size_t length = frame.payload.size();
      Item& item = *from.in.front();
      ++from.received;
      if (item.kind != Item::Kind::kAnnounce && length != std::min(kFrameBytes, item.bytes - item.done)) {
        events_.disagrees(*this, item, length);
        break;
      }
      in_item_ = &item;
      sink_ = Sink::kItem;
      in_left_ = length;
      take(frame.payload.data(), length);
      sink_ = Sink::kNone;
      in_item_ = nullptr;
      if (item.kind == Item::Kind::kAnnounce || item.done == item.bytes) {
        from.in.pop_front();
        --posted_in_;
        events_.completed(item);
      }
      break;
    }
  }
  return fd_ >= 0;
}

// Reads once. A long payload goes where it belongs, with the next header behind it; all else to the inbox. False: there
// is nothing more now.
bool Link::read_more() {
  if (inbox_at_ == inbox_end_) inbox_at_ = inbox_end_ = 0;
  if (inbox_at_) {
    std::memmove(inbox_.data(), inbox_.data() + inbox_at_, inbox_end_ - inbox_at_);
    inbox_end_ -= inbox_at_;
    inbox_at_ = 0;
  }
  char* to = nullptr;
  std::size_t room = 0;
  if (in_left_ > 4096 && inbox_end_ == 0) {
    room = std::min(in_left_, kPiece);
    if (sink_ == Sink::kItem && in_item_->kind == Item::Kind::kWrite) {
      room = in_left_;
      to = in_item_->data + in_item_->done;
    } else if (sink_ == Sink::kItem && in_item_->kind == Item::Kind::kReduce) {
      if (scratch_.empty()) scratch_.resize(kPiece + 8);
      to = scratch_.data() + carry_;
    }
  }
  iovec parts[2];
  std::size_t count = 0;
  if (to) parts[count++] = {to, room};
  if (!to || room == in_left_)
    parts[count++] = {inbox_.data() + inbox_end_, to ? kHeaderBytes : inbox_.size() - inbox_end_};
  ssize_t got;
  do {
    got = readv(fd_, parts, static_cast<int>(count));
  } while (got < 0 && errno == EINTR);
  if (got < 0) {
    if (errno != EAGAIN && errno != EWOULDBLOCK) fail(std::strerror(errno));
    return false;
  }
  if (got == 0) {
    fail(leaving ? "it has left" : "its end of the connection was closed");
    return false;
  }
  std::size_t bytes = static_cast<std::size_t>(got);
  read_ += bytes;
  if (to) {
    const std::size_t payload = std::min(bytes, room);
    take(to, payload);
    bytes -= payload;
  }
  inbox_end_ += bytes;
  const bool whole = static_cast<std::size_t>(got) == parts[0].iov_len + (count > 1 ? parts[1].iov_len : 0);
  // Less than there was room for: the socket is empty, and epoll says when it is not.
  if (!whole && !draining_) {
    consume();
    return false;
  }
  return true;
}

}  // namespace commlab::links
