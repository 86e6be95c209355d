// CRC32C by folding: carry-less multiplication on registers of 64 bytes, several times as fast as the instruction for
// the checksum itself. Gopal and others, "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009.
#pragma once

#include <cstddef>
#include <cstdint>

namespace commlab::links {

// Below so many bytes folding does not apply.
constexpr std::size_t kFoldingBytes = 256;

// Whether processor and operating system have what it takes: VPCLMULQDQ and AVX-512.
bool has_folding();

// `state`: the checksum so far, inverted. Leaves 16 bytes that have the same checksum, begun with nothing, as the first
// bytes / kFoldingBytes * kFoldingBytes bytes at `data`, and returns how many these are. Only where has_folding(), and
// with at least kFoldingBytes bytes.
std::size_t fold_crc32c(std::uint32_t state, const void* data, std::size_t bytes, std::uint64_t left[2]);

}  // namespace commlab::links
