// The window's part of commlab._native that moves numbers: collectives and deliveries of a node's ranks, and the loops
// over their memories.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "bind_codes.h"
#include "cpu/gather.h"
#include "cpu/mappings.h"
#include "cpu/node_collective.h"
#include "cpu/node_delivery.h"
#include "cpu/piped.h"
#include "cpu/sync.h"

namespace nb = nanobind;
using namespace commlab;

namespace {

std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> found;
  for (Address address : addresses) found.push_back(reinterpret_cast<void*>(address));
  return found;
}

constexpr int kDone = 0;

// What is left of a NodeCollective, beside the ways by which one ends, or of a NodeDelivery.
constexpr int kAnnounced = 3, kUnderWay = 4;

// A few microseconds are over before another thread could take the GIL; getting it back may take 5 ms.
constexpr std::size_t kWithoutGilBytes = 64 * 1024;

using Pieces = std::vector<std::pair<Address, std::size_t>>;

std::vector<NodeDelivery::Piece> pieces_at(const Pieces& pieces) {
  std::vector<NodeDelivery::Piece> found;
  for (const auto& [address, bytes] : pieces) found.push_back({reinterpret_cast<char*>(address), bytes});
  return found;
}

int code_of(NodeDelivery::End end) {
  if (end == NodeDelivery::End::kDone) return kDone;
  return end == NodeDelivery::End::kUnderWay ? kUnderWay : kAnnounced;
}

PipedWork work_of(int dtype, int wire, int op, double divisor, bool reduce, bool gather,
                  const std::vector<std::pair<std::size_t, std::size_t>>& chunks, int out_dtype) {
  const auto known = reduce ? dtype_of : moved_dtype_of;
  PipedWork work{nullptr, known(dtype), known(wire), op_of(op), divisor, reduce, gather, {}, nullptr, known(out_dtype)};
  for (const auto& [start, stop] : chunks) work.chunks.push_back({start, stop});
  return work;
}

}  // namespace

void register_node(nb::module_& m) {
  m.attr("BLOCK_BYTES") = kBlockBytes;
  m.attr("ROOM_BYTES") = kRoomBytes;
  m.attr("STAGING_BYTES") = kStagingBytes;
  // The pipeline alone, with areas and blocks of any size, for its tests.
  nb::class_<Piped>(m, "Piped")
      .def(
          "__init__",
          [](Piped* self, NodeSync& sync, const std::vector<Address>& staging, std::size_t block_bytes, Address data,
             Address out, int dtype, int wire, int op, double divisor, bool reduce, bool gather,
             const std::vector<std::pair<std::size_t, std::size_t>>& chunks, int out_dtype) {
            std::vector<char*> areas;
            for (Address area : staging) areas.push_back(reinterpret_cast<char*>(area));
            PipedWork work = work_of(dtype, wire, op, divisor, reduce, gather, chunks, out_dtype);
            work.data = reinterpret_cast<void*>(data);
            work.out = reinterpret_cast<void*>(out);
            new (self) Piped(sync, std::move(areas), block_bytes, std::move(work));
          },
          nb::keep_alive<1, 2>())
      .def("run", &Piped::run, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("tick", &Piped::tick);

  // What call() returns: how the numbers went where it is done, else what is left.
  nb::class_<NodeCollective> collective(m, "NodeCollective");
  collective.attr("PIPED") = static_cast<int>(NodeWay::kPiped);
  collective.attr("IN_PLACE") = static_cast<int>(NodeWay::kInPlace);
  collective.attr("AT_ONCE") = static_cast<int>(NodeWay::kAtOnce);
  collective.attr("ANNOUNCED") = kAnnounced;
  collective.attr("UNDER_WAY") = kUnderWay;
  collective
      .def(
          "__init__",
          [](NodeCollective* self, NodeSync& sync, const Mappings& mappings, int dtype, int wire, int op,
             double divisor, bool reduce, bool gather, const std::vector<std::pair<std::size_t, std::size_t>>& chunks,
             bool to_rooms) {
            new (self) NodeCollective(sync, mappings, work_of(dtype, wire, op, divisor, reduce, gather, chunks, dtype),
                                      to_rooms);
          },
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("call",
           [](NodeCollective& self, std::uint64_t signature, std::uint64_t sequence, Address data, Address out,
              double timeout_us) {
             nb::gil_scoped_release released;
             const auto end = self.call(signature, sequence, reinterpret_cast<void*>(data),
                                        reinterpret_cast<void*>(out), timeout_us);
             if (end == NodeCollective::End::kAnnounced) return kAnnounced;
             return end == NodeCollective::End::kUnderWay ? kUnderWay : static_cast<int>(self.way());
           })
      .def("shown",
           [](NodeCollective& self, Address data) {
             const Place place = self.shown(reinterpret_cast<const void*>(data));
             return std::make_pair(place.segment, place.offset);
           })
      .def_prop_ro("way", [](const NodeCollective& self) { return static_cast<int>(self.way()); })
      .def("move",
           [](NodeCollective& self, Address data, Address out, int out_dtype, bool squared) {
             std::optional<nb::gil_scoped_release> released;
             if (self.bytes() >= kWithoutGilBytes) released.emplace();
             if (!self.move(reinterpret_cast<void*>(data), reinterpret_cast<void*>(out), moved_dtype_of(out_dtype),
                            squared))
               throw std::logic_error("memory of a rank is not mapped");
           })
      .def("run", &NodeCollective::run, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("tick", &NodeCollective::tick)
      .def_prop_ro("squares", &NodeCollective::squares);

  nb::class_<NodeDelivery> delivery(m, "NodeDelivery");
  delivery.attr("DONE") = kDone;
  delivery.attr("ANNOUNCED") = kAnnounced;
  delivery.attr("UNDER_WAY") = kUnderWay;
  delivery.attr("ANY") = NodeDelivery::kAny;
  delivery
      .def(
          "__init__",
          [](NodeDelivery* self, NodeSync& sync, const Mappings& mappings, const Pieces& stream,
             const std::vector<std::pair<std::size_t, std::size_t>>& ranges,
             const std::vector<std::int64_t>& expected) {
            std::vector<Chunk> chunks;
            for (const auto& [start, stop] : ranges) chunks.push_back({start, stop});
            new (self) NodeDelivery(sync, mappings, pieces_at(stream), chunks, expected);
          },
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("call",
           [](NodeDelivery& self, std::uint64_t signature, std::uint64_t sequence, Address, const Pieces& outs,
              double timeout_us) {
             nb::gil_scoped_release released;
             return code_of(self.call(signature, sequence, pieces_at(outs), timeout_us));
           })
      .def("call_whole",
           [](NodeDelivery& self, std::uint64_t signature, std::uint64_t sequence, Address stream, Address outs,
              double timeout_us) {
             nb::gil_scoped_release released;
             return code_of(self.call(signature, sequence, reinterpret_cast<char*>(stream),
                                      reinterpret_cast<char*>(outs), timeout_us));
           })
      .def_prop_ro("needs_staging", &NodeDelivery::needs_staging)
      // Fills a page at `page`, of 64 KB; segment, offset and bytes of what this rank publishes with it.
      .def("announce",
           [](const NodeDelivery& self, Address page) {
             std::vector<std::uint8_t> filled;
             const Place place = self.announce(filled);
             std::memcpy(reinterpret_cast<void*>(page), filled.data(), filled.size());
             return std::make_tuple(place.segment, place.offset, filled.size());
           })
      .def("sizes_agree", &NodeDelivery::sizes_agree)
      .def("size_from", &NodeDelivery::size_from)
      .def("needs_staging_of", &NodeDelivery::needs_staging_of)
      .def("move",
           [](NodeDelivery& self, const Pieces& outs) {
             nb::gil_scoped_release released;
             if (!self.move(pieces_at(outs))) throw std::logic_error("memory of a rank is not mapped");
           })
      .def("run", &NodeDelivery::run, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("tick", &NodeDelivery::tick);

  m.def("gather_reduce", [](const std::vector<Address>& dst, int dst_dtype, const std::vector<Address>& src, int dtype,
                            std::size_t numel, int op, double divisor, bool squares) {
    const auto to = pointers(dst);
    const auto from = pointers(src);
    const DType from_dtype = dtype_of(dtype);
    std::optional<nb::gil_scoped_release> released;
    if (numel * dtype_bytes(from_dtype) >= kWithoutGilBytes) released.emplace();
    const auto* sources = const_cast<const void* const*>(from.data());
    if (squares) {
      if (dtype_of(dst_dtype) != DType::kFloat32) throw std::invalid_argument("squares are of fp32 results");
      return gather_reduce_squares(to.data(), to.size(), sources, from.size(), from_dtype, numel, op_of(op), divisor);
    }
    gather_reduce(to.data(), to.size(), dtype_of(dst_dtype), sources, from.size(), from_dtype, numel, op_of(op),
                  divisor);
    return 0.0;
  });
  m.def(
      "copy_through",
      [](Address dst, Address src, std::size_t bytes) {
        copy_through(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes);
      },
      nb::call_guard<nb::gil_scoped_release>());
}
