// Where the memory that a node's ranks share lies in this process: what native code needs to find a peer's numbers by
// the place that the peer has published.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace commlab {

constexpr std::uint64_t kNowhere = ~0ull;  // the segment of an ordinary tensor

struct Place {
  std::uint64_t segment = kNowhere, offset = 0;
};

// Threads may map and unmap while another one looks: a segment that an operation needs stays until its end.
class Mappings {
 public:
  Mappings(std::size_t ranks, std::size_t rank);

  void add(std::size_t rank, std::uint64_t segment, char* address, std::size_t bytes);
  void drop(std::size_t rank, std::uint64_t segment);

  // The place of `bytes` at `address` in this rank's own memory.
  Place locate(const char* address, std::size_t bytes) const;
  // The address of `bytes` at a place of `rank`; null where this process has not mapped them.
  char* at(std::size_t rank, Place place, std::size_t bytes) const;

 private:
  struct Mapped {
    char* address;
    std::size_t bytes;
  };

  std::size_t rank_;
  mutable std::mutex mutex_;
  std::vector<std::unordered_map<std::uint64_t, Mapped>> mapped_;  // of each rank, by segment
  std::map<const char*, std::uint64_t> own_;                       // this rank's segments by their addresses
};

}  // namespace commlab
