// Reduce out of many memories at once: what an owner does to its shard when all ranks' parts lie in the window.
//
// No partial sum ever goes back to memory: a register is filled from every source in rank order, divided, rounded once,
// and written to every destination. So each number is read once and written once per rank, as in a copy.
#pragma once

#include <cstddef>

#include "dtype.h"
#include "reduce.h"

namespace commlab {

// Of one node; bounds arrays on the stack.
constexpr std::size_t kMaxRanks = 512;

// dst[d][i] = round((src[0][i] OP src[1][i] OP ...) / divisor) for all d, i < numel. Summed in rank order, 16-bit types
// in fp32. dst_dtype equals dtype, or is fp32 where dtype has 16 bits (then nothing is rounded). A destination is one
// of the sources or overlaps none. divisor 1: none; only for floating point. cached: the results are read again soon,
// so they are never written past the caches.
void gather_reduce(void* const* dst, std::size_t destinations, DType dst_dtype, const void* const* src,
                   std::size_t sources, DType dtype, std::size_t numel, Op op, double divisor, bool cached = false);

// The same for fp32 results, and the sum of their squares, in blocks of kSquaresBlock: the norm of a reduced gradient
// without another pass over it.
double gather_reduce_squares(void* const* dst, std::size_t destinations, const void* const* src, std::size_t sources,
                             DType dtype, std::size_t numel, Op op, double divisor);

// Copies with stores that pass the caches by: for memory that this rank does not read again soon.
void copy_through(void* dst, const void* src, std::size_t bytes);

}  // namespace commlab
