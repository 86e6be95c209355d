#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

#include "crc32c_folding.h"

namespace commlab::links {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78u;  // bits reversed

using Table = std::array<std::array<std::uint32_t, 256>, 8>;

// table[k][b]: the checksum of byte b followed by k zero bytes.
constexpr Table byte_tables() {
  Table table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? (crc >> 1) ^ kPolynomial : crc >> 1;
    table[0][byte] = crc;
  }
  for (std::uint32_t byte = 0; byte < 256; ++byte)
    for (std::size_t k = 1; k < 8; ++k)
      table[k][byte] = (table[k - 1][byte] >> 8) ^ table[0][table[k - 1][byte] & 0xff];
  return table;
}

constexpr Table kTables = byte_tables();

std::uint32_t by_table(std::uint32_t crc, const void* data, std::size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    std::uint32_t next = 0;
    for (std::size_t k = 0; k < 8; ++k) {
      const std::uint32_t byte = k < 4 ? (at[k] ^ crc >> (8 * k)) & 0xff : at[k];
      next ^= kTables[7 - k][byte];
    }
    crc = next;
  }
  for (; bytes; --bytes, ++at) crc = (crc >> 8) ^ kTables[0][(crc ^ *at) & 0xff];
  return ~crc;
}

#if defined(__x86_64__)

// A stream is so long: three of them are 12 KB, which stay in the first-level cache.
constexpr std::size_t kStream = 4096;

using Shift = std::array<std::array<std::uint32_t, 256>, 4>;

// shift[k][b]: what byte k of a checksum, having the value b, becomes when kStream zero bytes follow.
Shift stream_shift() {
  // The checksum is linear in its bits: follow each of the 32 bits through the zeros.
  std::array<std::uint32_t, 32> of_bit{};
  for (std::size_t bit = 0; bit < 32; ++bit) {
    std::uint32_t crc = 1u << bit;
    for (std::size_t byte = 0; byte < kStream; ++byte) crc = (crc >> 8) ^ kTables[0][crc & 0xff];
    of_bit[bit] = crc;
  }
  Shift shift{};
  for (std::size_t k = 0; k < 4; ++k)
    for (std::uint32_t byte = 0; byte < 256; ++byte)
      for (std::size_t bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) shift[k][byte] ^= of_bit[8 * k + bit];
  return shift;
}

std::uint32_t shifted(const Shift& shift, std::uint32_t crc) {
  return shift[0][crc & 0xff] ^ shift[1][crc >> 8 & 0xff] ^ shift[2][crc >> 16 & 0xff] ^ shift[3][crc >> 24];
}

std::uint64_t word(const unsigned char* from) {
  std::uint64_t found;
  std::memcpy(&found, from, 8);
  return found;
}

// Clang has the instruction apart from the others of SSE 4.2; not every GCC knows it by that name.
#if defined(__clang__)
#define CRC_TARGET __attribute__((target("sse4.2,crc32")))
#else
#define CRC_TARGET __attribute__((target("sse4.2")))
#endif

// The instruction takes three cycles and one can begin in every cycle: three streams take as long as one.
CRC_TARGET std::uint32_t by_instruction(std::uint32_t crc, const void* data, std::size_t bytes) {
  static const Shift shift = stream_shift();
  const auto* at = static_cast<const unsigned char*>(data);
  std::uint64_t a = ~crc;
  for (; bytes >= 3 * kStream; bytes -= 3 * kStream, at += 3 * kStream) {
    std::uint64_t b = 0, c = 0;
    for (std::size_t i = 0; i < kStream; i += 8) {
      a = _mm_crc32_u64(a, word(at + i));
      b = _mm_crc32_u64(b, word(at + kStream + i));
      c = _mm_crc32_u64(c, word(at + 2 * kStream + i));
    }
    a = shifted(shift, shifted(shift, static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b)) ^ c;
  }
  for (; bytes >= 8; bytes -= 8, at += 8) a = _mm_crc32_u64(a, word(at));
  for (; bytes; --bytes, ++at) a = _mm_crc32_u8(static_cast<std::uint32_t>(a), *at);
  return ~static_cast<std::uint32_t>(a);
}

// Asked of the processor itself: compilers other than GCC answer __builtin_cpu_supports only after a start-up call.
bool asked() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_SSE4_2);
}

// Once: in a virtual machine the question takes 20 us and more.
bool has_instruction() {
  static const bool found = asked();
  return found;
}

#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)

std::uint32_t by_instruction(std::uint32_t crc, const void* data, std::size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    std::uint64_t word;
    std::memcpy(&word, at, 8);
    crc = __crc32cd(crc, word);
  }
  for (; bytes; --bytes, ++at) crc = __crc32cb(crc, *at);
  return ~crc;
}

bool has_instruction() { return true; }

#else

std::uint32_t by_instruction(std::uint32_t crc, const void* data, std::size_t bytes) {
  return by_table(crc, data, bytes);
}

bool has_instruction() { return false; }

#endif

std::uint32_t by_folding(std::uint32_t crc, const void* data, std::size_t bytes) {
  if (bytes < kFoldingBytes) return by_instruction(crc, data, bytes);
  std::uint64_t left[2];
  const std::size_t folded = fold_crc32c(~crc, data, bytes, left);
  // by_instruction() inverts what it is given and what it returns; here a checksum begins with nothing.
  return by_instruction(by_instruction(~0u, left, sizeof left), static_cast<const char*>(data) + folded,
                        bytes - folded);
}

Crc32cWay fastest() {
  for (const Crc32cWay way : {Crc32cWay::kFolding, Crc32cWay::kInstruction})
    if (has_crc32c(way)) return way;
  return Crc32cWay::kTable;
}

}  // namespace

bool has_crc32c(Crc32cWay way) {
  switch (way) {
    case Crc32cWay::kTable: return true;
    case Crc32cWay::kInstruction: return has_instruction();
    case Crc32cWay::kFolding: return has_instruction() && has_folding();
  }
  return false;
}

std::uint32_t crc32c_by(Crc32cWay way, std::uint32_t crc, const void* data, std::size_t bytes) {
  switch (way) {
    case Crc32cWay::kInstruction: return by_instruction(crc, data, bytes);
    case Crc32cWay::kFolding: return by_folding(crc, data, bytes);
    default: return by_table(crc, data, bytes);
  }
}

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes) {
  static const Crc32cWay way = fastest();
  return crc32c_by(way, crc, data, bytes);
}

}  // namespace commlab::links
