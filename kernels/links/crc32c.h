// CRC32C (Castagnoli) of a run of bytes: three streams of the processor's instruction side by side where it has one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace commlab::links {

// The checksum of what `crc` is the checksum of, followed by `bytes` bytes at `data`. Begin with 0.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes);

// The same without the instruction, for processors that lack it, and for the tests.
std::uint32_t crc32c_by_table(std::uint32_t crc, const void* data, std::size_t bytes);

}  // namespace commlab::links
