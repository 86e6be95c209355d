#include <fcntl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "crc32c.h"
#include "descriptors.h"
#include "link.h"

namespace commlab::links {

Link::Link(Events& events, std::uint32_t peer, int fd, bool checks)
    : events_(events), peer_(peer), fd_(fd), checks_(checks), inbox_(64 * 1024 + kHeaderBytes) {
  fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) | O_NONBLOCK);
  links::remember(fd_);
}

Link::~Link() { close(); }

void Link::close() {
  if (fd_ < 0) return;
  links::forget(fd_);
  ::close(fd_);
  fd_ = -1;
  stuck_ = blocked_ = false;
  // The rest of a frame that was on its way in never comes: its item goes on to wait.
  sink_ = Sink::kNone;
  in_item_ = nullptr;
}

Channel& Link::channel(std::uint32_t id) {
  std::unique_ptr<Channel>& found = channels_[id];
  if (!found) {
    found = std::make_unique<Channel>();
    found->id = id;
  }
  return *found;
}

void Link::post(std::uint32_t id, Item& item) {
  Channel& to = channel(id);
  if (item.kind == Item::Kind::kSend) {
    to.out.push_back(&item);
  } else {
    to.in.push_back(&item);
    ++posted_in_;
  }
  if (item.ready) ready(id, item);
}

void Link::ready(std::uint32_t id, Item& item) {
  item.ready = true;
  Channel& to = channel(id);
  if (item.kind == Item::Kind::kSend) sendable(to);
}

void Link::sendable(Channel& channel) {
  if (channel.queued || channel.out.empty() || !channel.out.front()->ready) return;
  channel.queued = true;
  sendable_.push_back(&channel);
}

void Link::post_control(std::uint32_t kind, const void* payload, std::size_t bytes) {
  Header header{kControl, kind, static_cast<std::uint32_t>(bytes), 0};
  if (checks_) header.check = crc32c(0, payload, bytes) ^ crc32c(0, &header, 12);
  std::vector<char> frame(kHeaderBytes + bytes);
  std::memcpy(frame.data(), &header, kHeaderBytes);
  if (bytes) std::memcpy(frame.data() + kHeaderBytes, payload, bytes);
  control_.push_back(std::move(frame));
}

// Chooses the next frame; false: there is none. The channels take turns, a frame each.
bool Link::load_frame() {
  out_sent_ = 0;
  if (!control_.empty()) {
    out_own_ = std::move(control_.front());
    control_.pop_front();
    std::memcpy(&out_header_, out_own_.data(), kHeaderBytes);
    out_head_bytes_ = 0;
    out_data_ = out_own_.data() + kHeaderBytes;
    out_data_bytes_ = out_own_.size() - kHeaderBytes;
    out_bytes_ = out_own_.size();
    out_item_ = nullptr;
    out_channel_ = nullptr;
    return true;
  }
  for (out_channel_ = nullptr; !out_channel_;) {
    if (sendable_.empty()) return false;
    out_channel_ = sendable_.front();
    sendable_.pop_front();
    out_channel_->queued = false;
    // Queued while the item before was on its way: the one that stands first now may not be ready.
    if (out_channel_->out.empty() || !out_channel_->out.front()->ready) out_channel_ = nullptr;
  }
  out_item_ = out_channel_->out.front();
  const std::size_t payload = std::min(kFrameBytes, out_item_->bytes - out_item_->done);
  out_head_ = out_item_->head;
  out_head_bytes_ = out_item_->head_bytes;
  out_data_ = out_item_->data + out_item_->done;
  out_data_bytes_ = payload - out_head_bytes_;
  out_header_ = {out_channel_->id, out_channel_->sent++, static_cast<std::uint32_t>(payload), 0};
  if (checks_)
    out_header_.check =
        crc32c(crc32c(0, out_head_, out_head_bytes_), out_data_, out_data_bytes_) ^ crc32c(0, &out_header_, 12);
  out_bytes_ = kHeaderBytes + payload;
  return true;
}

void Link::frame_sent() {
  const std::size_t payload = out_bytes_ - kHeaderBytes;
  out_bytes_ = 0;
  if (!out_item_) return;
  Item& item = *out_item_;
  out_item_ = nullptr;
  item.done += payload;
  Channel& channel = *out_channel_;
  const bool done = item.done == item.bytes;
  if (done) channel.out.pop_front();
  sendable(channel);
  if (done) events_.completed(item);
}

void Link::pump_out() {
  stuck_ = false;
  while (fd_ >= 0) {
    if (!out_bytes_ && !load_frame()) return;
    iovec parts[3];
    std::size_t count = 0, skip = out_sent_;
    const auto add = [&](const void* from, std::size_t bytes) {
      if (skip >= bytes) {
        skip -= bytes;
        return;
      }
      parts[count++] = {const_cast<char*>(static_cast<const char*>(from)) + skip, bytes - skip};
      skip = 0;
    };
    add(&out_header_, kHeaderBytes);
    add(out_head_, out_head_bytes_);
    add(out_data_, out_data_bytes_);
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    const ssize_t sent = sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        stuck_ = true;
        return;
      }
      const int code = errno;
      // What the peer said before it closed tells more than this error.
      drain();
      if (fd_ >= 0) fail(std::strerror(code));
      return;
    }
    out_sent_ += static_cast<std::size_t>(sent);
    if (out_sent_ == out_bytes_) frame_sent();
  }
}

void Link::forget(const Run& run) {
  if (out_item_ && out_item_->run == &run) {
    // The rest of the frame must still leave, or the peer would take the next frame for it.
    std::vector<char> rest;
    rest.insert(rest.end(), out_head_, out_head_ + out_head_bytes_);
    rest.insert(rest.end(), out_data_, out_data_ + out_data_bytes_);
    out_own_ = std::move(rest);
    out_head_bytes_ = 0;
    out_data_ = out_own_.data();
    out_data_bytes_ = out_own_.size();
    out_item_ = nullptr;
  }
  if (in_item_ && in_item_->run == &run) {
    in_item_ = nullptr;
    sink_ = Sink::kDiscard;
    carry_ = 0;
  }
  const auto belongs = [&](Item* item) { return item->run == &run; };
  for (auto& [id, channel] : channels_) {
    auto& in = channel->in;
    auto& out = channel->out;
    const std::size_t before = in.size();
    in.erase(std::remove_if(in.begin(), in.end(), belongs), in.end());
    posted_in_ -= before - in.size();
    out.erase(std::remove_if(out.begin(), out.end(), belongs), out.end());
    if (channel->queued && (out.empty() || !out.front()->ready)) {
      channel->queued = false;
      sendable_.erase(std::find(sendable_.begin(), sendable_.end(), channel.get()));
    }
    sendable(*channel);
  }
}

bool Link::awaits(const Run& run, bool sends) const {
  const auto belongs = [&](const Item* item) { return item->run == &run; };
  for (const auto& [id, channel] : channels_) {
    if (sends) {
      if (std::any_of(channel->out.begin(), channel->out.end(), belongs)) return true;
      continue;
    }
    // Frames that came early are for the first items, as soon as these are ready.
    std::size_t early = channel->early.size();
    auto item = channel->in.begin();
    for (; item != channel->in.end(); ++item) {
      // At least one: all bytes may be there, of a frame whose end was never seen or whose checksum was wrong.
      const std::size_t left = (*item)->bytes - (*item)->done;
      const std::size_t frames = (*item)->kind == Item::Kind::kAnnounce || !left ? 1 : frames_of(left);
      if (frames > early) break;
      early -= frames;
    }
    if (std::any_of(item, channel->in.end(), belongs)) return true;
  }
  return false;
}

std::size_t Link::early_frames(std::uint32_t id) const {
  const auto found = channels_.find(id);
  return found == channels_.end() ? 0 : found->second->early.size();
}

const std::vector<char>* Link::first_early(std::uint32_t id) const {
  const auto found = channels_.find(id);
  return found == channels_.end() || found->second->early.empty() ? nullptr : &found->second->early.front().payload;
}

void Link::discard(std::uint32_t id) {
  Channel& given_up = channel(id);
  given_up.discards = true;
  early_ -= given_up.early.size();
  given_up.received += static_cast<std::uint32_t>(given_up.early.size());
  given_up.early.clear();
}

}  // namespace commlab::links
