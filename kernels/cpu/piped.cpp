#include "piped.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace commlab {
namespace {

// What is cast, added and cast back at a time, so that all of it stays in the first-level cache.
constexpr std::size_t kStripNumel = 2048;

char* element(void* base, std::size_t index, DType dtype) {
  return static_cast<char*>(base) + index * dtype_bytes(dtype);
}

// Copies with a cast where the dtypes differ (fp32 and a 16-bit type).
void convert(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t numel) {
  if (dst_dtype == src_dtype)
    std::memcpy(dst, src, numel * dtype_bytes(dst_dtype));
  else if (is_16bit(dst_dtype))
    reduce_loops().narrow(dst, static_cast<const float*>(src), numel, dst_dtype, 1.0f);
  else
    reduce_loops().widen(static_cast<float*>(dst), src, numel, src_dtype);
}

}  // namespace

Piped::Piped(NodeSync& sync, std::vector<char*> staging, std::size_t block_bytes, PipedWork work)
    : sync_(sync),
      staging_(std::move(staging)),
      operation_(sync.operation()),
      block_bytes_(block_bytes),
      work_(std::move(work)) {
  const std::size_t ranks = sync_.size();
  if (staging_.size() != ranks || work_.chunks.size() != ranks)
    throw std::invalid_argument("one staging area and one chunk per rank are needed");
  if (work_.wire != work_.dtype && !(work_.dtype == DType::kFloat32 && is_16bit(work_.wire)))
    throw std::invalid_argument("a wire other than the data's own is 16-bit, for fp32 data");
  if (!work_.gather && work_.wire != work_.dtype)
    throw std::invalid_argument("a wire other than the data's own is for allreduce");
  std::size_t used = 0, longest = 0;
  for (const Chunk& chunk : work_.chunks) {
    used += chunk.stop > chunk.start;
    longest = std::max(longest, chunk.stop - chunk.start);
  }
  // A block is the same slice of every chunk; slices are whole cache lines.
  const std::size_t slices = work_.reduce ? std::max<std::size_t>(used, 1) : 1;
  slice_numel_ = block_bytes_ / slices / 64 * 64 / dtype_bytes(work_.wire);
  if (!slice_numel_) throw std::invalid_argument("the staging area is too small for so many ranks");
  blocks_ = (longest + slice_numel_ - 1) / slice_numel_;
}

Chunk Piped::block_of(std::size_t chunk, std::size_t block) const {
  const Chunk& whole = work_.chunks[chunk];
  const std::size_t start = std::min(whole.stop, whole.start + block * slice_numel_);
  return {start, std::min(whole.stop, start + slice_numel_)};
}

void Piped::copy_in(std::size_t block) {
  const std::size_t mine = sync_.rank();
  if (!work_.reduce) {
    const Chunk part = block_of(mine, block);
    convert(out(mine, block), work_.wire, element(work_.data, part.start, work_.dtype), work_.dtype,
            part.stop - part.start);
    return;
  }
  std::size_t slice = 0;
  for (std::size_t chunk = 0; chunk < work_.chunks.size(); ++chunk) {
    if (work_.chunks[chunk].stop == work_.chunks[chunk].start) continue;
    if (chunk == mine) {
      ++slice;
      continue;
    }
    const Chunk part = block_of(chunk, block);
    convert(element(in(mine, block), slice++ * slice_numel_, work_.wire), work_.wire,
            element(work_.data, part.start, work_.dtype), work_.dtype, part.stop - part.start);
  }
}

void Piped::reduce(std::size_t block) {
  const std::size_t mine = sync_.rank();
  const Chunk part = block_of(mine, block);
  if (part.start == part.stop) return;
  std::size_t slice = 0;
  for (std::size_t chunk = 0; chunk < mine; ++chunk) slice += work_.chunks[chunk].stop > work_.chunks[chunk].start;
  char* own = element(work_.data, part.start, work_.dtype);
  from_.clear();
  for (std::size_t rank = 0; rank < sync_.size(); ++rank)
    from_.push_back(rank == mine ? own : element(in(rank, block), slice * slice_numel_, work_.wire));
  if (work_.wire != work_.dtype) return reduce_casting(own, out(mine, block), part.stop - part.start);
  void* to[2] = {out(mine, block), own};
  std::size_t destinations = 2;
  DType to_dtype = work_.wire;
  if (!work_.gather) {
    to[0] = own;
    destinations = 1;
    if (work_.out) {
      to_dtype = work_.out_dtype;
      to[0] = element(work_.out, part.start - work_.chunks[mine].start, to_dtype);
    }
  }
  gather_reduce(to, destinations, to_dtype, from_.data(), from_.size(), work_.wire, part.stop - part.start, work_.op,
                work_.divisor, /*cached=*/true);
}

void Piped::reduce_casting(char* own, char* to, std::size_t numel) {
  alignas(64) std::uint16_t cast[kStripNumel];
  const std::size_t mine = sync_.rank();
  for (std::size_t done = 0; done < numel; done += kStripNumel) {
    const std::size_t strip = std::min(kStripNumel, numel - done);
    char* const mine_fp32 = own + done * sizeof(float);
    char* const result = to + done * sizeof(std::uint16_t);
    convert(cast, work_.wire, mine_fp32, work_.dtype, strip);
    strip_ = from_;
    for (const void*& from : strip_) from = static_cast<const char*>(from) + done * sizeof(std::uint16_t);
    strip_[mine] = cast;
    void* destination = result;
    gather_reduce(&destination, 1, work_.wire, strip_.data(), strip_.size(), work_.wire, strip, work_.op, work_.divisor,
                  /*cached=*/true);
    convert(mine_fp32, work_.dtype, result, work_.wire, strip);
  }
}

void Piped::copy_out(std::size_t block) {
  for (std::size_t shift = 0; shift < work_.chunks.size(); ++shift) {
    // Everyone starts with its own shard, or the one after it: no two ranks read the same memory at a time.
    const std::size_t rank = (sync_.rank() + shift) % work_.chunks.size();
    const Chunk part = block_of(rank, block);
    if (part.start == part.stop || rank == sync_.rank()) continue;
    convert(element(work_.data, part.start, work_.dtype), work_.dtype, out(rank, block), work_.wire,
            part.stop - part.start);
  }
}

int Piped::run(double timeout_us) {
  // Without a reduction its tick falls away, and a block is copied out one tick after it was copied in. Two ticks are
  // kept between uses of a buffer all the same: copying in writes `out` directly then.
  const std::size_t lag = work_.reduce ? 2 : 1;
  const std::size_t ticks = blocks_ + (work_.gather ? lag : 1);
  while (tick_ < ticks) {
    if (!waiting_) {
      if (tick_ < blocks_) copy_in(tick_);
      if (work_.reduce && tick_ >= 1 && tick_ - 1 < blocks_) reduce(tick_ - 1);
      if (work_.gather && tick_ >= lag && tick_ - lag < blocks_) copy_out(tick_ - lag);
      if (tick_ + 1 == ticks) break;
      sync_.arrive();
      waiting_ = true;
    }
    // One block is little to do: where ranks share cores, 256 KB took 4 of them 94 us so and 153 without.
    if (const int late = sync_.wait(timeout_us, /*soon=*/blocks_ == 1); late >= 0) return late;
    waiting_ = false;
    ++tick_;
  }
  tick_ = ticks;
  return -1;
}

}  // namespace commlab
