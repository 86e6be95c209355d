// The record of the agreement check.
#pragma once

#include <cstdint>

namespace commlab {

// Signature.number() of commlab/runtime/agreement.py: there it would take whole numbers of more than 64 bits.
constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15;
inline std::uint64_t record_of(std::uint64_t signature, std::uint64_t sequence) { return signature ^ sequence * kOdd; }

}  // namespace commlab
