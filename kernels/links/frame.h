// What travels on a connection: frames, each 16 bytes that say what follows, and the payload.
//
// Both ends run operations that match, so a frame needs no tag: the channel says whose it is, the sequence that none is
// missing. A payload that is not as long as its receiver expects is an error that both sides are told of, never a wrong
// sum. Ranks have one byte order, which their cards compare before they connect.
#pragma once

#include <cstddef>
#include <cstdint>

namespace commlab::links {

struct Header {
  std::uint32_t channel;   // 2 * group + 1 for messages, 2 * group for what the group does in order; or kControl
  std::uint32_t sequence;  // how many frames of this channel went before, this way; of kControl: a Control
  std::uint32_t length;    // bytes of payload
  std::uint32_t check;     // checksum of the payload, XOR that of the 12 bytes before; 0 where it is turned off
};
static_assert(sizeof(Header) == 16);

constexpr std::size_t kHeaderBytes = sizeof(Header);
// The longest payload. What is longer travels in several frames.
constexpr std::size_t kFrameBytes = 256 * 1024;

constexpr std::uint32_t kControl = 0xffffffffu;
enum Control : std::uint32_t {
  kLeaving = 1,  // this rank closes its connections in good order
  kLost = 2,     // payload: 4 bytes, a group of which a run of this rank has failed; 4, whose loss it was; the reason
  kBroken = 3,   // payload: 4 bytes, the group in which ranks did not agree on sizes, and the two sides as text
};
constexpr std::size_t kControlBytes = 8 + 256;

// Of one connection's channels: what a group does in order, and messages that are matched in the order of posting.
constexpr std::uint32_t program_channel(std::uint32_t group) { return 2 * group; }
constexpr std::uint32_t message_channel(std::uint32_t group) { return 2 * group + 1; }
constexpr std::uint32_t kMaxGroup = 0x7ffffffeu;

}  // namespace commlab::links
