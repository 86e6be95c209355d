// The window's part of commlab._native that is about its memory: pages, segments, and how the ranks of a node wait for
// each other.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind_codes.h"
#include "cpu/gather.h"
#include "cpu/mappings.h"
#include "cpu/sync.h"
#include "record.h"

namespace nb = nanobind;
using namespace commlab;

namespace {

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
}
