// The record of the agreement check, and what ranks announce to each other over links.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

namespace commlab {

// Signature.number() of commlab/runtime/agreement.py: there it would take whole numbers of more than 64 bits.
constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15;
inline std::uint64_t record_of(std::uint64_t signature, std::uint64_t sequence) { return signature ^ sequence * kOdd; }

// The record, and the number of the operation in plain: so that whoever awaits another operation knows which is
// earlier.
constexpr std::size_t kAnnouncedBytes = 16;
inline std::string announcement(std::uint64_t signature, std::uint64_t sequence) {
  const std::uint64_t words[2] = {record_of(signature, sequence), sequence};
  return std::string(reinterpret_cast<const char*>(words), sizeof(words));
}
inline std::uint64_t announced_sequence(const char* announced) {
  std::uint64_t sequence;
  std::memcpy(&sequence, announced + 8, sizeof(sequence));
  return sequence;
}

}  // namespace commlab
