#include "gather.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace commlab {
namespace {

// Below this the results are still in the caches when the other ranks come to read them.
constexpr std::size_t kStreamFromBytes = 1 << 20;

namespace portable {
#define LANES_TARGET
#define LANES_BYTES 16
#include "lanes.h"
//
#include "operations.h"
//
#include "gather_loops.h"
#include "lanes_end.h"
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define LANES_TARGET __attribute__((target("avx2,f16c")))
#define LANES_BYTES 32
#include "lanes.h"
//
#include "operations.h"
//
#include "gather_loops.h"
#include "lanes_end.h"
}  // namespace avx2

namespace avx512 {
#define LANES_TARGET __attribute__((target("avx512f,avx512bw,avx2,f16c")))
#define LANES_BYTES 64
#include "lanes.h"
//
#include "operations.h"
//
#include "gather_loops.h"
#include "lanes_end.h"
}  // namespace avx512
#endif

}  // namespace

void gather_reduce(void* const* dst, std::size_t destinations, DType dst_dtype, const void* const* src,
                   std::size_t sources, DType dtype, std::size_t numel, Op op, double divisor, bool cached) {
  if (sources == 0 || sources > kMaxRanks || destinations > kMaxRanks)
    throw std::invalid_argument("gather_reduce takes 1 to 512 sources and up to 512 destinations");
  if (dst_dtype != dtype && !(is_16bit(dtype) && dst_dtype == DType::kFloat32))
    throw std::invalid_argument("gather_reduce writes the sources' dtype, or fp32 where they have 16 bits");
  if (divisor != 1 && !is_float(dtype))
    throw std::invalid_argument("gather_reduce divides floating-point numbers only");
  bool streaming = !cached && numel * dtype_bytes(dtype) * destinations >= kStreamFromBytes;
  for (std::size_t d = 0; d < destinations; ++d)
    streaming = streaming && reinterpret_cast<std::uintptr_t>(dst[d]) % 64 == 0;
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512)
    return avx512::gather(dst, destinations, dst_dtype, src, sources, dtype, numel, op, divisor, streaming);
  if (isa() == Isa::kAvx2)
    return avx2::gather(dst, destinations, dst_dtype, src, sources, dtype, numel, op, divisor, streaming);
#endif
  portable::gather(dst, destinations, dst_dtype, src, sources, dtype, numel, op, divisor, false);
}

double gather_reduce_squares(void* const* dst, std::size_t destinations, const void* const* src, std::size_t sources,
                             DType dtype, std::size_t numel, Op op, double divisor) {
  // A block's results are still in the first cache when they are squared.
  if (destinations == 0 || destinations > kMaxRanks || sources > kMaxRanks)
    throw std::invalid_argument("gather_reduce_squares takes 1 to 512 sources and destinations");
  double total = 0;
  float* to[kMaxRanks];
  const void* from[kMaxRanks];
  for (std::size_t start = 0; start < numel; start += kSquaresBlock) {
    const std::size_t block = std::min(numel - start, kSquaresBlock);
    for (std::size_t d = 0; d < destinations; ++d) to[d] = static_cast<float*>(dst[d]) + start;
    for (std::size_t s = 0; s < sources; ++s) from[s] = static_cast<const char*>(src[s]) + start * dtype_bytes(dtype);
    gather_reduce(reinterpret_cast<void* const*>(to), destinations, DType::kFloat32, from, sources, dtype, block, op,
                  divisor, /*cached=*/true);
    total += reduce_loops().squares(to[0], block);
  }
  return total;
}

void copy_through(void* dst, const void* src, std::size_t bytes) {
#if defined(__x86_64__)
  auto* to = static_cast<char*>(dst);
  const auto* from = static_cast<const char*>(src);
  const std::size_t head = -reinterpret_cast<std::uintptr_t>(to) % 16;
  if (bytes >= kStreamFromBytes && head < bytes) {
    std::memcpy(to, from, head);
    std::size_t at = head;
    for (; at + 64 <= bytes; at += 64)
      for (std::size_t part = 0; part < 64; part += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + at + part),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at + part)));
    _mm_sfence();
    std::memcpy(to + at, from + at, bytes - at);
    return;
  }
#endif
  std::memcpy(dst, src, bytes);
}

}  // namespace commlab
