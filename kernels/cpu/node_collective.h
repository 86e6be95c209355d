// A collective of a node's ranks as one call, from the agreement check to the result: an allreduce or one of its
// halves. Which way the numbers go, all ranks see from the places that all have published:
//
//   in place    all numbers lie in the window      wait | out of all memories, and into them | wait
//   at once     nobody's do, and they fit a room   copy mine to my room | wait | out of all rooms
//   piped       all else                           wait | block by block (piped.h)
//
// Rooms. Each rank has two, used in turn like its slots (sync.h), and for the same reason two suffice: whoever fills
// the room of operation k + 2 has seen everyone arrive at k + 1, and so be done with the rooms of k; of two ranks it
// may be the other one's room (NodeSync::holder). A rank may end, and give its memory back, as soon as it has read the
// others' rooms. So rooms are only used once all ranks have mapped them all, which each tells with its place; the
// operation before that goes block by block, where ranks map each other's memory before they meet once more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "mappings.h"
#include "piped.h"
#include "sync.h"

namespace commlab {

// A rank's staging segment: four blocks (piped.h), behind them the two rooms.
constexpr std::uint64_t kStaging = 0;
constexpr std::size_t kBlockBytes = 1 << 20;
constexpr std::size_t kRoomBytes = 512 << 10;
constexpr std::size_t kStagingBytes = 4 * kBlockBytes + 2 * kRoomBytes;

// Where what `rank` shows in a room lies in the operation of this number; null where this process has not mapped that.
inline char* room_of(const NodeSync& sync, const Mappings& mappings, std::size_t rank, std::uint32_t operation) {
  const Place place{kStaging, 4 * kBlockBytes + operation % 2 * kRoomBytes};
  return mappings.at(sync.holder(rank, operation), place, kRoomBytes);
}

enum class NodeWay : int { kPiped, kInPlace, kAtOnce };

class NodeCollective {
 public:
  // `work` but for where the numbers lie. to_rooms: whether this rank is for the rooms where its numbers are not in the
  // window; so many fit. This rank has made its staging segment.
  NodeCollective(NodeSync& sync, const Mappings& mappings, PipedWork work, bool to_rooms);

  // The collective on `data` from the agreement check on; `out`: where a reduction alone leaves this rank's chunk.
  // Waits for timeout_us at most, each time that all ranks meet.
  enum class End { kDone, kAnnounced, kUnderWay };
  End call(std::uint64_t signature, std::uint64_t sequence, void* data, void* out, double timeout_us);

  // The same in steps, for whoever announces it and waits by itself: once all ranks have arrived, the way is known;
  // move() begins, and run() goes on until done (-1), or until a rank has been waited for longer than timeout_us (that
  // rank). Also for what call() has left. Announced: the record is published, and all the rest is left: not all ranks
  // have arrived in time, or they do not agree, or this process has not mapped some rank's memory yet.
  // What to publish next for numbers that are not in the window: whether this rank is for the rooms, and has mapped
  // them; then they are in its room.
  Place shown(const void* data);
  NodeWay way() const;
  // out_dtype: dtype, or fp32. squared: whether squares() is asked for. False: memory is not mapped yet.
  bool move(void* data, void* out, DType out_dtype, bool squared);
  int run(double timeout_us);
  std::size_t bytes() const { return offset(numel_); }
  // Grows whenever all ranks have gone on.
  std::size_t tick() const { return piped_ ? piped_->tick() : 0; }
  // The sum of squares of the fp32 numbers that this rank has reduced where they lie in the window.
  double squares() const { return squares_; }

 private:
  void fill(char* room, const void* data) const;  // with what peers will read of this rank's numbers
  // base[r]: where rank r's numbers lie.
  void reduce(const std::vector<char*>& base, NodeWay way, bool squared);
  void gather(const std::vector<char*>& base);
  std::size_t offset(std::size_t number) const { return number * dtype_bytes(work_.dtype); }

  NodeSync& sync_;
  const Mappings& mappings_;
  PipedWork work_;
  bool to_rooms_, mapped_ = false, arriving_ = false;
  double squares_ = 0;
  std::size_t numel_ = 0;
  std::vector<void*> to_;
  std::vector<const void*> from_;
  std::optional<Piped> piped_;
};

}  // namespace commlab
