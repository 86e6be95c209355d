#include "node_collective.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../record.h"
#include "gather.h"

namespace commlab {

NodeCollective::NodeCollective(NodeSync& sync, const Mappings& mappings, PipedWork work, bool to_rooms)
    : sync_(sync), mappings_(mappings), work_(std::move(work)), to_rooms_(to_rooms) {
  if (work_.chunks.size() != sync_.size()) throw std::invalid_argument("one chunk per rank is needed");
  for (const Chunk& chunk : work_.chunks) numel_ = std::max(numel_, chunk.stop);
  if (to_rooms_ && (offset(numel_) > kRoomBytes || work_.wire != work_.dtype))
    throw std::invalid_argument("a room has 512 KiB, for numbers that travel as they are");
}

NodeCollective::End NodeCollective::call(std::uint64_t signature, std::uint64_t sequence, void* data, void* out,
                                         double timeout_us) {
  Place place;
  if (work_.wire == work_.dtype) place = mappings_.locate(static_cast<const char*>(data), offset(numel_));
  if (place.segment == kNowhere) place = shown(data);
  sync_.publish(record_of(signature, sequence), place.segment, place.offset, nullptr, 0);
  sync_.arrive();
  if (sync_.wait(timeout_us, /*soon=*/to_rooms_) >= 0) return End::kAnnounced;
  if (!sync_.agreed() || !move(data, out, work_.dtype, /*squared=*/false)) return End::kAnnounced;
  return run(timeout_us) >= 0 ? End::kUnderWay : End::kDone;
}

Place NodeCollective::shown(const void* data) {
  if (!to_rooms_) return {kNowhere, 0};
  for (std::size_t rank = 0; rank < sync_.size() && !mapped_; ++rank) {
    if (mappings_.at(rank, {kStaging, 0}, kStagingBytes)) continue;
    if (rank == sync_.rank()) throw std::logic_error("this rank has no staging segment");
    return {kNowhere, 0};
  }
  mapped_ = true;
  fill(room_of(sync_, mappings_, sync_.rank(), sync_.operation() + 1), data);
  return {kNowhere, 1};
}

NodeWay NodeCollective::way() const {
  std::size_t placed = 0, to_rooms = 0;
  for (std::size_t rank = 0; rank < sync_.size(); ++rank) {
    placed += sync_.slot(rank).segment != kNowhere;
    to_rooms += sync_.slot(rank).segment == kNowhere && sync_.slot(rank).offset == 1;
  }
  if (to_rooms == sync_.size()) return NodeWay::kAtOnce;
  return placed == sync_.size() && work_.wire == work_.dtype ? NodeWay::kInPlace : NodeWay::kPiped;
}

bool NodeCollective::move(void* data, void* out, DType out_dtype, bool squared) {
  const std::size_t bytes = offset(numel_);
  const NodeWay way = this->way();
  std::vector<char*> base;
  for (std::size_t rank = 0; rank < sync_.size(); ++rank) {
    const Slot& slot = sync_.slot(rank);
    base.push_back(way == NodeWay::kAtOnce    ? room_of(sync_, mappings_, rank, sync_.operation())
                   : way == NodeWay::kInPlace ? mappings_.at(rank, {slot.segment, slot.offset}, bytes)
                                              : mappings_.at(rank, {kStaging, 0}, kStagingBytes));
    if (!base.back()) return false;
  }
  work_.data = data;
  work_.out = out;
  work_.out_dtype = out_dtype;
  piped_.reset();
  arriving_ = way == NodeWay::kInPlace;
  if (way == NodeWay::kPiped) {
    piped_.emplace(sync_, std::move(base), kBlockBytes, work_);
    return true;
  }
  // My own numbers are read where they are: in the caches, and nobody else writes them before all meet again.
  base[sync_.rank()] = static_cast<char*>(data);
  if (work_.reduce)
    reduce(base, way, squared);
  else
    gather(base);
  if (arriving_) sync_.arrive();
  return true;
}

int NodeCollective::run(double timeout_us) {
  if (piped_) return piped_->run(timeout_us);
  return arriving_ ? sync_.wait(timeout_us) : -1;
}

void NodeCollective::fill(char* room, const void* data) const {
  const Chunk own = work_.chunks[sync_.rank()];
  const auto copy = [&](std::size_t start, std::size_t stop) {
    std::memcpy(room + offset(start), static_cast<const char*>(data) + offset(start), offset(stop - start));
  };
  if (!work_.reduce) return copy(own.start, own.stop);
  if (work_.gather) return copy(0, numel_);
  copy(0, own.start);
  copy(own.stop, numel_);
}

void NodeCollective::reduce(const std::vector<char*>& base, NodeWay way, bool squared) {
  const bool all = work_.gather && way == NodeWay::kAtOnce;
  const Chunk part = all ? Chunk{0, numel_} : work_.chunks[sync_.rank()];
  to_.clear();
  for (char* theirs : base) to_.push_back(theirs + offset(part.start));
  from_.assign(to_.begin(), to_.end());
  DType to_dtype = work_.dtype;
  if (all || !work_.gather) to_ = {to_[sync_.rank()]};
  if (!work_.gather && work_.out) {
    to_ = {work_.out};
    to_dtype = work_.out_dtype;
  }
  if (squared && way == NodeWay::kInPlace && to_dtype == DType::kFloat32)
    squares_ = gather_reduce_squares(to_.data(), to_.size(), from_.data(), from_.size(), work_.dtype,
                                     part.stop - part.start, work_.op, work_.divisor);
  else
    gather_reduce(to_.data(), to_.size(), to_dtype, from_.data(), from_.size(), work_.dtype, part.stop - part.start,
                  work_.op, work_.divisor, /*cached=*/way == NodeWay::kAtOnce);
}

void NodeCollective::gather(const std::vector<char*>& base) {
  for (std::size_t shift = 1; shift < base.size(); ++shift) {
    // Everyone starts with its neighbour: no two ranks read the same memory at a time.
    const std::size_t rank = (sync_.rank() + shift) % base.size();
    const Chunk chunk = work_.chunks[rank];
    copy_through(static_cast<char*>(work_.data) + offset(chunk.start), base[rank] + offset(chunk.start),
                 offset(chunk.stop - chunk.start));
  }
}

}  // namespace commlab
