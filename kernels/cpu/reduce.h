// Element-wise arithmetic on raw memory: what a rank does to the bytes it received.
//
// 16-bit numbers are always computed in fp32 and rounded to nearest even once per call.
// Integers wrap. NaN wins over every number in min and max; of two zeros that differ only in
// sign, min and max return src's. Every instruction set gives the same bits (NaN payloads excepted).
// Pointers need no alignment. dst and src are the same range or do not overlap.
#pragma once

#include <cstddef>

#include "dtype.h"

namespace commlab {

enum class Op : int { kSum = 0, kProd = 1, kMin = 2, kMax = 3 };

// One fp32 sum of 6 M squares is wrong by 1e-4, and by something else for each way of cutting them; of so many by 1e-8.
constexpr std::size_t kSquaresBlock = 4096;

// The loops below, compiled for one instruction set.
struct ReduceLoops {
  // dst[i] = dst[i] OP src[i]
  void (*reduce)(void* dst, const void* src, std::size_t numel, DType dtype, Op op);
  // dst[i] = dst[i] OP fp32(src[i]); dst is fp32, src is 16-bit
  void (*accumulate)(float* dst, const void* src, std::size_t numel, DType dtype16, Op op);
  // dst[i] = fp32(src[i])
  void (*widen)(float* dst, const void* src, std::size_t numel, DType dtype16);
  // dst[i] = round(src[i] / divisor). A divisor and not a factor: the mean of 3 ranks is x / 3, which
  // x * (1 / 3) misses by one unit in the last place for about a third of all x.
  void (*narrow)(void* dst, const float* src, std::size_t numel, DType dtype16, float divisor);
  // dst[i] = dst[i] * factor, floating point only; the factor is rounded to fp32 except for fp64
  void (*scale)(void* dst, std::size_t numel, DType dtype, double factor);
  // dst[i] = dst[i] / divisor, floating point only; the divisor is rounded to fp32 except for fp64
  void (*divide)(void* dst, std::size_t numel, DType dtype, double divisor);
  // The sum of the squares of kSquaresBlock numbers or fewer: 64 sums in fp32, added in fp64.
  double (*squares)(const float* src, std::size_t numel);
};

// The loops of the instruction set in use (see isa.h).
const ReduceLoops& reduce_loops();

}  // namespace commlab
