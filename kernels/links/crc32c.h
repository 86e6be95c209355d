// CRC32C (Castagnoli) of a run of bytes, by the fastest of three ways that the processor has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace commlab::links {

// The checksum of what `crc` is the checksum of, followed by `bytes` bytes at `data`. Begin with 0.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes);

enum class Crc32cWay : int {
  kTable = 0,        // eight look-ups for eight bytes; everywhere
  kInstruction = 1,  // the processor's own, in three streams side by side
  kFolding = 2,      // crc32c_folding.h, and the instruction for what is left
};
bool has_crc32c(Crc32cWay way);
// The same by one of them, which the processor must have. For tests.
std::uint32_t crc32c_by(Crc32cWay way, std::uint32_t crc, const void* data, std::size_t bytes);

}  // namespace commlab::links
