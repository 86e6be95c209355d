#include "mappings.h"

namespace commlab {

Mappings::Mappings(std::size_t ranks, std::size_t rank) : rank_(rank), mapped_(ranks) {}

void Mappings::add(std::size_t rank, std::uint64_t segment, char* address, std::size_t bytes) {
  const std::lock_guard guard(mutex_);
  mapped_.at(rank)[segment] = {address, bytes};
  if (rank == rank_) own_[address] = segment;
}

void Mappings::drop(std::size_t rank, std::uint64_t segment) {
  const std::lock_guard guard(mutex_);
  const auto found = mapped_.at(rank).find(segment);
  if (found == mapped_[rank].end()) return;
  if (rank == rank_) own_.erase(found->second.address);
  mapped_[rank].erase(found);
}

Place Mappings::locate(const char* address, std::size_t bytes) const {
  const std::lock_guard guard(mutex_);
  auto after = own_.upper_bound(address);
  if (after == own_.begin()) return {};
  const auto [start, segment] = *--after;
  const std::size_t offset = address - start;
  return offset + bytes <= mapped_[rank_].at(segment).bytes ? Place{segment, offset} : Place{};
}

char* Mappings::at(std::size_t rank, Place place, std::size_t bytes) const {
  const std::lock_guard guard(mutex_);
  const auto found = mapped_.at(rank).find(place.segment);
  if (found == mapped_[rank].end()) return nullptr;
  const auto [address, has] = found->second;
  return place.offset <= has && bytes <= has - place.offset ? address + place.offset : nullptr;
}

}  // namespace commlab
