// The window's part of commlab._native: waiting for the ranks of a node, and loops over their memories.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/gather.h"
#include "cpu/mappings.h"
#include "cpu/node_collective.h"
#include "cpu/node_delivery.h"
#include "cpu/piped.h"
#include "cpu/sync.h"
#include "record.h"

namespace nb = nanobind;
using namespace commlab;

namespace {

using Address = std::uintptr_t;

DType dtype_of(int code) {
  if (code < 0 || code > 5) throw std::invalid_argument("dtype code " + std::to_string(code) + " is not one of 0..5");
  return static_cast<DType>(code);
}

// Of data that are only moved.
DType moved_dtype_of(int code) { return code == static_cast<int>(DType::kByte) ? DType::kByte : dtype_of(code); }

Op op_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("op code " + std::to_string(code) + " is not one of 0..3");
  return static_cast<Op>(code);
}

std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> found;
  for (Address address : addresses) found.push_back(reinterpret_cast<void*>(address));
  return found;
}

void format_page(Address page, std::uint32_t local_rank, nb::bytes token) {
  auto* control = new (reinterpret_cast<void*>(page)) Control{};
  if (token.size() != sizeof(control->token)) throw std::invalid_argument("a token has 16 bytes");
  std::memcpy(control->token, token.c_str(), token.size());
  for (SegmentEntry& entry : control->segments) entry.number.store(~0ull, std::memory_order_relaxed);
  control->local_rank = local_rank;
  control->abi = kAbi;
  control->magic = kMagic;
}

// Why the page that begins with these bytes, wherever they lie, is not the one that it should be; empty if it is.
std::string wrong_page(Address head, std::uint32_t local_rank, nb::bytes token) {
  const auto* bytes = reinterpret_cast<const char*>(head);
  decltype(Control::magic) magic;
  decltype(Control::abi) abi;
  decltype(Control::local_rank) owner;
  std::memcpy(&magic, bytes + offsetof(Control, magic), sizeof magic);
  std::memcpy(&abi, bytes + offsetof(Control, abi), sizeof abi);
  std::memcpy(&owner, bytes + offsetof(Control, local_rank), sizeof owner);
  if (magic != kMagic) return "not a commlab window";
  if (abi != kAbi) return "window layout " + std::to_string(abi) + ", mine is " + std::to_string(kAbi);
  if (token.size() != 16 || std::memcmp(bytes + offsetof(Control, token), token.c_str(), 16) != 0)
    return "another job's window";
  if (owner != local_rank) return "the window of local rank " + std::to_string(owner);
  return "";
}

std::vector<Control*> pages_at(const std::vector<Address>& addresses) {
  std::vector<Control*> pages;
  for (Address address : addresses) pages.push_back(reinterpret_cast<Control*>(address));
  return pages;
}

// `as_published`: this rank's own numbers too are those that it has published, and not what lies at `data` by now.
void reduce_inline(const NodeSync& sync, Address data, std::size_t numel, int dtype, int op, double divisor,
                   bool as_published) {
  const void* from[kMaxRanks];
  void* to = reinterpret_cast<void*>(data);
  for (std::size_t rank = 0; rank < sync.size(); ++rank) from[rank] = sync.inline_data(rank);
  if (!as_published) from[sync.rank()] = to;
  gather_reduce(&to, 1, dtype_of(dtype), from, sync.size(), dtype_of(dtype), numel, op_of(op), divisor,
                /*cached=*/true);
}

// How allreduce_inline ended. Done: nothing is left to do. Late: it is announced, but not all ranks have arrived.
constexpr int kDone = 0, kLate = 1, kDisagree = 2;

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

void register_window(nb::module_& m) {
  // The group of all ranks, and with it its window, lives until the interpreter ends: no leak, and no reason to say so.
  nb::set_leak_warnings(false);
  m.attr("CONTROL_BYTES") = sizeof(Control);
  m.attr("INLINE_BYTES") = kInlineBytes;
  m.attr("MAX_SEGMENTS") = kMaxSegments;
  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("HEADER_BYTES") = offsetof(Control, arrived);
  m.def("format_page", &format_page);
  m.def("wrong_page", [](Address page, std::uint32_t local_rank, nb::bytes token) {
    const std::string why = wrong_page(page, local_rank, token);
    return nb::str(why.c_str());
  });

  // Python's mmap keeps a descriptor for each mapping, and there are ranks times segments of them.
  m.def("map_shared", [](int fd, std::size_t bytes) {
    void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (address == MAP_FAILED) {
      PyErr_SetFromErrno(PyExc_OSError);
      throw nb::python_error();
    }
    return reinterpret_cast<Address>(address);
  });
  m.def("unmap", [](Address address, std::size_t bytes) { munmap(reinterpret_cast<void*>(address), bytes); });

  nb::class_<NodeSync>(m, "NodeSync")
      .def("__init__", [](NodeSync* self, std::size_t rank, const std::vector<Address>& pages,
                          double spin_us) { new (self) NodeSync(rank, pages_at(pages), spin_us); })
      .def("publish",
           [](NodeSync& self, std::uint64_t record, std::uint64_t segment, std::uint64_t offset, Address data,
              std::size_t bytes) {
             self.publish(record, segment, offset, reinterpret_cast<const void*>(data), bytes);
             self.arrive();
           })
      .def("arrive", &NodeSync::arrive)
      .def("lagging", &NodeSync::lagging)
      .def(
          "wait", [](NodeSync& self, double timeout_us, bool soon) { return self.wait(timeout_us, soon); },
          nb::arg("timeout_us"), nb::arg("soon") = false, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("look_us", &NodeSync::look_us)
      .def("agreed", &NodeSync::agreed)
      .def("inline_address",
           [](const NodeSync& self, std::size_t rank) {
             if (rank >= self.size()) throw std::invalid_argument("no such rank in this window");
             return reinterpret_cast<Address>(self.inline_data(rank));
           })
      .def("places",
           [](const NodeSync& self) {
             std::vector<std::pair<std::uint64_t, std::uint64_t>> places;
             for (std::size_t rank = 0; rank < self.size(); ++rank)
               places.emplace_back(self.slot(rank).segment, self.slot(rank).offset);
             return places;
           })
      .def("inlined",
           [](const NodeSync& self, std::size_t bytes) {
             if (bytes > kInlineBytes) throw std::invalid_argument("a control page holds 64 KB");
             nb::list found;
             for (std::size_t rank = 0; rank < self.size(); ++rank)
               found.append(nb::bytes(reinterpret_cast<const char*>(self.inline_data(rank)), bytes));
             return found;
           })
      .def("add_segment",
           [](NodeSync& self, std::uint64_t number, std::uint64_t fd, std::uint64_t bytes) {
             SegmentEntry& entry = self.page(self.rank()).segments[number % kMaxSegments];
             entry.fd = fd;
             entry.bytes = bytes;
             entry.number.store(number, std::memory_order_release);
           })
      .def("drop_segment",
           [](NodeSync& self, std::uint64_t number) {
             self.page(self.rank()).segments[number % kMaxSegments].number.store(~0ull, std::memory_order_release);
           })
      // (descriptor, bytes) of a rank's segment; (0, 0) once the rank has given it back.
      .def("segment",
           [](const NodeSync& self, std::size_t rank, std::uint64_t number) {
             const SegmentEntry& entry = self.page(rank).segments[number % kMaxSegments];
             if (entry.number.load(std::memory_order_acquire) != number)
               return std::make_tuple(std::uint64_t{0}, std::uint64_t{0});
             return std::make_tuple(entry.fd, entry.bytes);
           })
      .def("meet",
           [](NodeSync& self, std::uint64_t signature, std::uint64_t sequence, double timeout_us) {
             self.publish(record_of(signature, sequence), kNowhere, 0, nullptr, 0);
             self.arrive();
             nb::gil_scoped_release released;
             return self.wait(timeout_us, /*soon=*/true) < 0 && self.agreed();
           })
      .def("reduce_inline",
           [](const NodeSync& self, Address data, std::size_t numel, int dtype, int op, double divisor) {
             reduce_inline(self, data, numel, dtype, op, divisor, /*as_published=*/true);
           })
      .def("allreduce_inline", [](NodeSync& self, std::uint64_t signature, std::uint64_t sequence, Address data,
                                  std::size_t numel, int dtype, int op, double divisor, double timeout_us) {
        const std::uint64_t record = record_of(signature, sequence);
        self.publish(record, ~0ull, 0, reinterpret_cast<const void*>(data), numel * dtype_bytes(dtype_of(dtype)));
        self.arrive();
        int late;
        {
          nb::gil_scoped_release released;
          late = self.wait(timeout_us, /*soon=*/true);
        }
        if (late >= 0) return kLate;
        if (!self.agreed()) return kDisagree;
        // My own are read where they are written: 64 KB of two ranks take 4.7 us so, and 10.8 out of the page.
        reduce_inline(self, data, numel, dtype, op, divisor, /*as_published=*/false);
        return kDone;
      });

  m.attr("BLOCK_BYTES") = kBlockBytes;
  m.attr("ROOM_BYTES") = kRoomBytes;
  m.attr("STAGING_BYTES") = kStagingBytes;
  nb::class_<Mappings>(m, "Mappings")
      .def(nb::init<std::size_t, std::size_t>())
      .def("add", [](Mappings& self, std::size_t rank, std::uint64_t segment, Address address,
                     std::size_t bytes) { self.add(rank, segment, reinterpret_cast<char*>(address), bytes); })
      .def("drop", &Mappings::drop)
      .def("locate",
           [](const Mappings& self, Address address, std::size_t bytes) {
             const Place place = self.locate(reinterpret_cast<const char*>(address), bytes);
             return std::make_pair(place.segment, place.offset);
           })
      .def("at", [](const Mappings& self, std::size_t rank, std::uint64_t segment, std::uint64_t offset,
                    std::size_t bytes) { return reinterpret_cast<Address>(self.at(rank, {segment, offset}, bytes)); });

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
