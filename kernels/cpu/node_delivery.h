// A delivery among a node's ranks: each has a stream of bytes and says which range of it each peer gets, in any sizes.
// What a rank sends travels by the length of its stream alone:
//
//   in the page   up to 64 KB with its table     behind the table that it publishes            one wait
//   in a room     up to 512 KB                   in its room (node_collective.h)               one wait
//   in rounds     beyond                         through its staging area, 2 MiB at a time     and one more for each
//
// Everybody reads everybody's table, so all know a size on which two ranks differ before a byte is moved, and which
// streams lie in rooms: those of ranks whose staging area everyone has mapped that reads from them, which each rank
// tells with its table. For the reader need not meet the writer again, which may end, with its memory, right after.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "mappings.h"
#include "node_collective.h"
#include "piped.h"
#include "sync.h"

namespace commlab {

class NodeDelivery {
 public:
  struct Piece {
    char* data;
    std::size_t bytes;
  };
  static constexpr std::int64_t kAny = -1;  // what a rank expects that takes what comes

  // The pieces of `stream` lie one behind the other; rank r gets its bytes ranges[r]. expected[r]: how many bytes this
  // rank has room for from rank r.
  NodeDelivery(NodeSync& sync, const Mappings& mappings, std::vector<Piece> stream, const std::vector<Chunk>& ranges,
               const std::vector<std::int64_t>& expected);

  // Whether this rank's staging area has to be there before the delivery is published.
  bool needs_staging() const { return has_staging(table_.data(), bytes_); }
  // What this rank publishes: `page`, and with it which staging areas it has mapped. Fills the page, and the room.
  Place announce(std::vector<std::uint8_t>& page) const;

  // Once all ranks have arrived and agree: every rank's table, three rows: starts and ends of its ranges, what it
  // expects.
  const std::int64_t* table(std::size_t rank) const;
  bool sizes_agree() const;
  std::size_t size_from(std::size_t rank) const;
  // Begins to copy into `outs`, one per rank. False: some memory is not mapped yet, and nothing was done.
  bool move(std::vector<Piece> outs);
  // Whether this rank has to map the staging area of `rank` now: because it reads there, or will show its own stream
  // there (NodeSync::holder).
  bool needs_staging_of(std::size_t rank) const;
  // Goes on until done (-1), or until a rank has been waited for longer than timeout_us (that rank).
  int run(double timeout_us);
  // Grows whenever all ranks have gone on.
  std::size_t tick() const { return round_; }

  // All of that in one call. Announced: published, and all the rest is left: not all ranks have arrived in time, or
  // they do not agree, or memory is not mapped yet. Under way: run() has to go on.
  enum class End { kDone, kAnnounced, kUnderWay };
  End call(std::uint64_t signature, std::uint64_t sequence, const std::vector<Piece>& outs, double timeout_us);
  // The same for another stream of as many bytes, in one piece, and into rooms that lie one behind the other.
  End call(std::uint64_t signature, std::uint64_t sequence, char* stream, char* outs, double timeout_us);

 private:
  enum class Way { kPage, kRoom, kRounds };
  std::size_t table_bytes() const { return 3 * sync_.size() * sizeof(std::int64_t); }
  bool inline_of(std::size_t stream_bytes) const { return table_bytes() + stream_bytes <= kInlineBytes; }
  std::size_t stream_bytes_of(std::size_t rank) const;
  Chunk range(std::size_t from, std::size_t to) const;
  Way way_of(std::size_t rank) const;
  // Whether the rank with this table and so long a stream has made its staging area.
  bool has_staging(const std::int64_t* rows, std::size_t stream_bytes) const;
  void show(std::size_t start, std::size_t stop, char* to) const;  // a range of this rank's stream
  template <class Copy>
  void from_each(Way way, const Copy& copy);  // copy(rank, range), the neighbour first

  NodeSync& sync_;
  const Mappings& mappings_;
  std::vector<Piece> stream_, outs_;
  std::vector<std::int64_t> table_;  // what this rank publishes
  std::size_t bytes_ = 0;            // of the stream
  std::vector<Way> ways_;            // of every rank's stream, from move() on
  std::size_t round_ = 0, rounds_ = 0;
  bool waiting_ = false;
};

}  // namespace commlab
