#include "node_delivery.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../record.h"
#include "gather.h"

namespace commlab {
namespace {

// Two halves, used alternately: what a round writes was read in the round before the last one, and all have left that.
constexpr std::size_t kHalfBytes = 2 * kBlockBytes;
// The ranks whose bit a place has room for; on larger nodes no stream goes through a room.
constexpr std::size_t kBits = 64;

void copy(char* to, const char* from, std::size_t bytes) {
  if (bytes < kInlineBytes)
    std::memcpy(to, from, bytes);
  else
    copy_through(to, from, bytes);
}

}  // namespace

NodeDelivery::NodeDelivery(NodeSync& sync, const Mappings& mappings, std::vector<Piece> stream,
                           const std::vector<Chunk>& ranges, const std::vector<std::int64_t>& expected)
    : sync_(sync), mappings_(mappings), stream_(std::move(stream)) {
  const std::size_t ranks = sync_.size();
  if (ranges.size() != ranks || expected.size() != ranks) throw std::invalid_argument("one range per rank is needed");
  if (table_bytes() > kInlineBytes) throw std::invalid_argument("the table is too large for a control page");
  std::size_t has = 0;
  for (const Piece& piece : stream_) has += piece.bytes;
  for (const Chunk& each : ranges) {
    if (each.start > each.stop || each.stop > has) throw std::invalid_argument("a range outside of the stream");
    bytes_ = std::max(bytes_, each.stop);  // all that anybody reads
  }
  for (const Chunk& each : ranges) table_.push_back(static_cast<std::int64_t>(each.start));
  for (const Chunk& each : ranges) table_.push_back(static_cast<std::int64_t>(each.stop));
  table_.insert(table_.end(), expected.begin(), expected.end());
}

Place NodeDelivery::announce(std::vector<std::uint8_t>& page) const {
  page.resize(table_bytes() + (inline_of(bytes_) ? bytes_ : 0));
  std::memcpy(page.data(), table_.data(), table_bytes());
  std::uint64_t mapped = 0;
  for (std::size_t rank = 0; rank < std::min(sync_.size(), kBits); ++rank)
    mapped |= std::uint64_t{mappings_.at(rank, {kStaging, 0}, kStagingBytes) != nullptr} << rank;
  if (inline_of(bytes_)) {
    show(0, bytes_, reinterpret_cast<char*>(page.data()) + table_bytes());
  } else if (bytes_ <= kRoomBytes) {
    if (!mappings_.at(sync_.rank(), {kStaging, 0}, kStagingBytes))
      throw std::logic_error("this rank has no staging area");
    // Where this rank has not mapped it yet, it says so, and nobody reads there.
    if (char* const room = room_of(sync_, mappings_, sync_.rank(), sync_.operation() + 1)) show(0, bytes_, room);
  }
  return {kNowhere, mapped};
}

const std::int64_t* NodeDelivery::table(std::size_t rank) const {
  return reinterpret_cast<const std::int64_t*>(sync_.inline_data(rank));
}

Chunk NodeDelivery::range(std::size_t from, std::size_t to) const {
  const std::int64_t* rows = table(from);
  return {static_cast<std::size_t>(rows[to]), static_cast<std::size_t>(rows[sync_.size() + to])};
}

std::size_t NodeDelivery::size_from(std::size_t rank) const {
  const Chunk wanted = range(rank, sync_.rank());
  return wanted.stop - wanted.start;
}

std::size_t NodeDelivery::stream_bytes_of(std::size_t rank) const {
  std::size_t bytes = 0;
  for (std::size_t to = 0; to < sync_.size(); ++to) bytes = std::max(bytes, range(rank, to).stop);
  return bytes;
}

bool NodeDelivery::sizes_agree() const {
  const std::size_t ranks = sync_.size();
  for (std::size_t from = 0; from < ranks; ++from)
    for (std::size_t to = 0; to < ranks; ++to) {
      const std::int64_t expected = table(to)[2 * ranks + from];
      const Chunk sent = range(from, to);
      if (expected != kAny && expected != static_cast<std::int64_t>(sent.stop - sent.start)) return false;
    }
  return true;
}

bool NodeDelivery::has_staging(const std::int64_t* rows, std::size_t stream_bytes) const {
  if (!inline_of(stream_bytes)) return true;
  // Of two ranks the other one may show its stream there.
  const std::int64_t* expected = rows + 2 * sync_.size();
  return sync_.size() == 2 && std::any_of(expected, expected + 2, [this](std::int64_t bytes) {
           return bytes != kAny && !inline_of(static_cast<std::size_t>(bytes));
         });
}

bool NodeDelivery::needs_staging_of(std::size_t rank) const {
  if (size_from(rank) && way_of(rank) != Way::kPage) return true;
  return sync_.size() == 2 && rank != sync_.rank() && has_staging(table(rank), stream_bytes_of(rank));
}

NodeDelivery::Way NodeDelivery::way_of(std::size_t rank) const {
  const std::size_t bytes = stream_bytes_of(rank);
  if (inline_of(bytes)) return Way::kPage;
  if (bytes > kRoomBytes || sync_.size() > kBits) return Way::kRounds;
  const std::size_t holder = sync_.holder(rank, sync_.operation());
  for (std::size_t to = 0; to < sync_.size(); ++to) {
    const Chunk wanted = range(rank, to);
    const bool needs = to == rank || wanted.start != wanted.stop;
    if (needs && !(sync_.slot(to).offset >> holder & 1)) return Way::kRounds;
  }
  return Way::kRoom;
}

template <class Copy>
void NodeDelivery::from_each(Way way, const Copy& copy_range) {
  for (std::size_t shift = 0; shift < sync_.size(); ++shift) {
    // Everyone starts with itself, and then its neighbour: no two ranks read the same memory at a time.
    const std::size_t rank = (sync_.rank() + shift) % sync_.size();
    const Chunk wanted = range(rank, sync_.rank());
    if (wanted.start != wanted.stop && ways_[rank] == way) copy_range(rank, wanted);
  }
}

bool NodeDelivery::move(std::vector<Piece> outs) {
  const std::size_t ranks = sync_.size();
  if (outs.size() != ranks) throw std::invalid_argument("one room per rank is needed");
  std::size_t longest = 0;
  ways_.clear();
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    ways_.push_back(way_of(rank));
    if (outs[rank].bytes != size_from(rank)) throw std::invalid_argument("a room of another size than what comes");
    if (size_from(rank) && ways_[rank] != Way::kPage && !mappings_.at(rank, {kStaging, 0}, kStagingBytes)) return false;
    if (ways_[rank] == Way::kRounds) longest = std::max(longest, stream_bytes_of(rank));
  }
  outs_ = std::move(outs);
  round_ = 0;
  rounds_ = (longest + kHalfBytes - 1) / kHalfBytes;
  waiting_ = false;
  from_each(Way::kPage, [&](std::size_t rank, Chunk wanted) {
    const char* data = reinterpret_cast<const char*>(sync_.inline_data(rank)) + table_bytes();
    copy(outs_[rank].data, data + wanted.start, wanted.stop - wanted.start);
  });
  from_each(Way::kRoom, [&](std::size_t rank, Chunk wanted) {
    const char* data = room_of(sync_, mappings_, rank, sync_.operation());
    copy(outs_[rank].data, data + wanted.start, wanted.stop - wanted.start);
  });
  return true;
}

int NodeDelivery::run(double timeout_us) {
  const std::size_t mine = sync_.rank();
  for (; round_ < rounds_; ++round_) {
    const std::size_t half = round_ % 2 * kHalfBytes;
    const Chunk shown{round_ * kHalfBytes, (round_ + 1) * kHalfBytes};
    if (!waiting_) {
      // The operation before may still be read when this one is announced: its end is that all have arrived here.
      if (ways_[mine] == Way::kRounds && shown.start < bytes_)
        show(shown.start, std::min(shown.stop, bytes_), mappings_.at(mine, {kStaging, half}, kHalfBytes));
      sync_.arrive();
      waiting_ = true;
    }
    if (const int late = sync_.wait(timeout_us); late >= 0) return late;
    waiting_ = false;
    from_each(Way::kRounds, [&](std::size_t rank, Chunk wanted) {
      const std::size_t start = std::max(wanted.start, shown.start), stop = std::min(wanted.stop, shown.stop);
      if (start >= stop) return;
      const char* data = mappings_.at(rank, {kStaging, half}, kHalfBytes);
      copy(outs_[rank].data + (start - wanted.start), data + (start - shown.start), stop - start);
    });
  }
  return -1;
}

NodeDelivery::End NodeDelivery::call(std::uint64_t signature, std::uint64_t sequence, const std::vector<Piece>& outs,
                                     double timeout_us) {
  static thread_local std::vector<std::uint8_t> page;
  const Place here = announce(page);
  sync_.publish(record_of(signature, sequence), here.segment, here.offset, page.data(), page.size());
  sync_.arrive();
  if (sync_.wait(timeout_us, /*soon=*/true) >= 0) return End::kAnnounced;
  if (!sync_.agreed() || !sizes_agree() || !move(outs)) return End::kAnnounced;
  return run(timeout_us) >= 0 ? End::kUnderWay : End::kDone;
}

NodeDelivery::End NodeDelivery::call(std::uint64_t signature, std::uint64_t sequence, char* stream, char* outs,
                                     double timeout_us) {
  stream_ = {{stream, bytes_}};
  std::vector<Piece> rooms;
  for (std::size_t rank = 0; rank < sync_.size(); ++rank) {
    const std::int64_t bytes = table_[2 * sync_.size() + rank];
    if (bytes < 0) throw std::invalid_argument("rooms are as large as what is expected");
    rooms.push_back({outs, static_cast<std::size_t>(bytes)});
    outs += bytes;
  }
  return call(signature, sequence, rooms, timeout_us);
}

void NodeDelivery::show(std::size_t start, std::size_t stop, char* to) const {
  std::size_t at = 0;
  for (const Piece& piece : stream_) {
    const std::size_t first = std::max(at, start), last = std::min(at + piece.bytes, stop);
    if (first < last) copy(to + (first - start), piece.data + (first - at), last - first);
    at += piece.bytes;
  }
}

}  // namespace commlab
