// Collectives of a node's ranks on ordinary memory: each rank's data pass, block by block, through a small staging area
// of the window that stays in the caches, so that memory sees one read and one write.
//
//   tick t        copy in          block t      the others' shards to my `in`           (cast to the wire)
//                 reduce my shard  block t-1    out of all other `in`s and my own data  to my `out` and my own data
//                 copy out         block t-2    from all other `out`s                   (cast from the wire)
//                 wait for all ranks
//
// Where there is a cast my own shard is cast there and back in passing: its numbers must be the wire's.
//
// One wait a tick suffices with two of each buffer, used alternately: what tick t writes (in[t%2], out[(t-1)%2]) was
// last read in tick t-1 (in by the reduction of block t-2, out by the copy of block t-3), and everyone has left tick
// t-1. After the last tick nobody waits here; but the next operation begins with a wait of its own, its agreement
// check, so no peer still copies out of what its first tick overwrites.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gather.h"
#include "sync.h"

namespace commlab {

struct Chunk {
  std::size_t start, stop;  // numbers of the flat buffer
};

// What is asked for. reduce and gather: allreduce; reduce alone: reduce-scatter (`out`, or my chunk of `data`, gets the
// result);
// gather alone: allgather, or with one chunk that is not empty a broadcast.
struct PipedWork {
  void* data;
  DType dtype;  // of data
  DType wire;   // of the staging: dtype itself, or 16-bit where dtype is fp32
  Op op;
  double divisor;
  bool reduce, gather;
  std::vector<Chunk> chunks;  // chunks[r] belongs to rank r
  void* out;                  // where reduce alone leaves my chunk; null: in `data`
  DType out_dtype;            // dtype, or fp32: the sums of 16-bit numbers, unrounded
};

class Piped {
 public:
  // staging[r]: rank r's 2 * (in + out) area as mapped here, `in` being block_bytes and `out` block_bytes long.
  Piped(NodeSync& sync, std::vector<char*> staging, std::size_t block_bytes, PipedWork work);

  // Goes on until done (-1) or until a rank has been waited for longer than timeout_us (that rank); call again then.
  int run(double timeout_us);

  // How far it is; grows whenever all ranks have gone on.
  std::size_t tick() const { return tick_; }

 private:
  Chunk block_of(std::size_t chunk, std::size_t block) const;
  void copy_in(std::size_t block);
  void reduce(std::size_t block);
  // The same for `numel` fp32 numbers at `own` on a 16-bit wire; the others' are at from_.
  void reduce_casting(char* own, char* to, std::size_t numel);
  void copy_out(std::size_t block);
  // Two ranks swap their areas after every two blocks, and from one operation to the next (NodeSync::holder).
  char* area(std::size_t rank, std::size_t block) const {
    return staging_[sync_.holder(rank, static_cast<std::uint32_t>(block) + 2 * operation_)] + block % 2 * block_bytes_;
  }
  char* in(std::size_t rank, std::size_t block) const { return area(rank, block); }
  char* out(std::size_t rank, std::size_t block) const { return area(rank, block) + 2 * block_bytes_; }

  NodeSync& sync_;
  std::vector<char*> staging_;
  std::uint32_t operation_;
  std::size_t block_bytes_, slice_numel_, blocks_, tick_ = 0;
  bool waiting_ = false;
  std::vector<const void*> from_, strip_;
  PipedWork work_;
};

}  // namespace commlab
