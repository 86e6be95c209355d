// A message is a polynomial over two elements, its first bit the highest power; the checksum is its remainder modulo P.
// Registers hold 128 bits each, in the order in which the instruction for CRC32C has them: bit i stands for x^(127 -
// i). Moved ahead by D bits, such a register is worth the same, modulo P, as
//
//   first 64 bits times (x^(D + 64) mod P)  +  last 64 bits times (x^D mod P)
//
// which has less than 128 bits, and is added (XOR) to the register D bits later: it is folded into that. In this order
// of bits a product of two registers of 64 bits comes out one power too high, so the factors are x^(D + 63) and x^(D -
// 1).
#include "crc32c_folding.h"

#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace commlab::links {

#if defined(__x86_64__)
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78u;  // bits reversed

// x^power mod P, as the upper half of a register of 64 bits: bit i stands for x^(63 - i).
constexpr std::uint64_t power_of_x(std::size_t power) {
  std::uint32_t rest = 0x80000000u;
  for (std::size_t at = 0; at < power; ++at) rest = rest & 1 ? (rest >> 1) ^ kPolynomial : rest >> 1;
  return static_cast<std::uint64_t>(rest) << 32;
}

// What both halves of a register are multiplied by that is moved ahead so far.
template <std::size_t kBits>
struct Ahead {
  static constexpr long long kFirst = static_cast<long long>(power_of_x(kBits + 63));
  static constexpr long long kLast = static_cast<long long>(power_of_x(kBits - 1));
};

#define FOLDING_TARGET __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.2")))

template <std::size_t kBits>
FOLDING_TARGET __m512i fold(__m512i from, __m512i into) {
  const __m512i ahead =
      _mm512_set_epi64(Ahead<kBits>::kLast, Ahead<kBits>::kFirst, Ahead<kBits>::kLast, Ahead<kBits>::kFirst,
                       Ahead<kBits>::kLast, Ahead<kBits>::kFirst, Ahead<kBits>::kLast, Ahead<kBits>::kFirst);
  constexpr int kXorOfThree = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(from, ahead, 0x00),
                                   _mm512_clmulepi64_epi128(from, ahead, 0x11), into, kXorOfThree);
}

FOLDING_TARGET __m512i load(const char* from) { return _mm512_loadu_si512(from); }

FOLDING_TARGET __m128i fold_lane(__m128i from, __m128i into) {
  const __m128i ahead = _mm_set_epi64x(Ahead<128>::kLast, Ahead<128>::kFirst);
  return _mm_xor_si128(into,
                       _mm_xor_si128(_mm_clmulepi64_si128(from, ahead, 0x00), _mm_clmulepi64_si128(from, ahead, 0x11)));
}

bool asked() {
  unsigned a, b, c, d;
  if (!has_isa(Isa::kAvx512) || !__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_PCLMUL) || !(c & bit_SSE4_2)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & bit_VPCLMULQDQ);
}

}  // namespace

bool has_folding() {
  static const bool found = asked();
  return found;
}

// Four registers of 64 bytes: a multiplication takes several cycles, and another one can begin meanwhile.
FOLDING_TARGET std::size_t fold_crc32c(std::uint32_t state, const void* data, std::size_t bytes,
                                       std::uint64_t left[2]) {
  const auto* at = static_cast<const char*>(data);
  const std::size_t all = bytes / kFoldingBytes * kFoldingBytes;
  const char* const stop = at + all;
  // The checksum so far counts as if it were added to the first bits.
  __m512i a = _mm512_xor_si512(load(at), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  __m512i b = load(at + 64), c = load(at + 128), d = load(at + 192);
  for (at += kFoldingBytes; at != stop; at += kFoldingBytes) {
    a = fold<2048>(a, load(at));
    b = fold<2048>(b, load(at + 64));
    c = fold<2048>(c, load(at + 128));
    d = fold<2048>(d, load(at + 192));
  }
  alignas(64) __m128i lanes[4];
  _mm512_store_si512(lanes, fold<512>(fold<512>(fold<512>(a, b), c), d));
  const __m128i rest = fold_lane(fold_lane(fold_lane(lanes[0], lanes[1]), lanes[2]), lanes[3]);
  left[0] = static_cast<std::uint64_t>(_mm_cvtsi128_si64(rest));
  left[1] = static_cast<std::uint64_t>(_mm_extract_epi64(rest, 1));
  return all;
}

#else

bool has_folding() { return false; }

std::size_t fold_crc32c(std::uint32_t, const void*, std::size_t, std::uint64_t[2]) { return 0; }

#endif

}  // namespace commlab::links
