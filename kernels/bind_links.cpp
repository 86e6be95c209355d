// The links' part of commlab._native: an engine, what it runs, and the addresses of this host.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "links/crc32c.h"
#include "links/engine.h"
#include "links/interfaces.h"
#include "links/keeper.h"
#include "links/leaders.h"
#include "record.h"

namespace nb = nanobind;
using namespace commlab;
using namespace commlab::links;

namespace {

using Address = std::uintptr_t;

// What is sent in the caller's own time. More than that is left to the thread, or to whoever waits, without the GIL.
constexpr std::size_t kHereBytes = 64 * 1024;

template <class T>
std::vector<T> numbers_of(nb::bytes data) {
  if (data.size() % sizeof(T) != 0) throw std::invalid_argument("a table of whole numbers is needed");
  std::vector<T> found(data.size() / sizeof(T));
  if (!found.empty()) std::memcpy(found.data(), data.c_str(), data.size());
  return found;
}

std::shared_ptr<const Program> make_program(nb::bytes rows, nb::bytes first, nb::bytes after, std::size_t numel,
                                            std::size_t ranks) {
  const auto table = numbers_of<std::uint64_t>(rows);
  if (table.size() % 4 != 0) throw std::invalid_argument("a row has four numbers");
  std::vector<Row> found;
  for (std::size_t at = 0; at < table.size(); at += 4) {
    if (table[at] > 3 || table[at + 1] >= ranks) throw std::invalid_argument("unknown opcode, or no such rank");
    found.push_back(
        {static_cast<Opcode>(table[at]), static_cast<std::uint32_t>(table[at + 1]), table[at + 2], table[at + 3]});
  }
  return std::make_shared<const Program>(std::move(found), numbers_of<std::uint32_t>(first),
                                         numbers_of<std::uint32_t>(after), numel, ranks);
}

Operand make_operand(Address buffer, std::size_t numel, int dtype, int op, double divisor, bool divides_first,
                     Address wide, std::size_t own_start, std::size_t own_numel, bool rounds) {
  if (dtype < 0 || dtype > static_cast<int>(DType::kByte) || op < 0 || op > 3)
    throw std::invalid_argument("unknown dtype or op");
  Operand operand;
  operand.buffer = reinterpret_cast<char*>(buffer);
  operand.numel = numel;
  operand.dtype = static_cast<DType>(dtype);
  operand.op = static_cast<Op>(op);
  operand.divisor = divisor;
  operand.divides_first = divides_first;
  operand.wide = reinterpret_cast<float*>(wide);
  operand.own_start = own_start;
  operand.own_numel = own_numel;
  operand.rounds = rounds;
  return operand;
}

// A run as Python holds it. Dropped before it has ended, it is given up first, and only then is `keep`, which holds the
// memory that it works on, let go.
class HeldRun {
 public:
  HeldRun(std::shared_ptr<Engine> engine, std::shared_ptr<Run> run, nb::object keep)
      : engine_(std::move(engine)), run_(std::move(run)), keep_(std::move(keep)) {}
  HeldRun(HeldRun&&) = default;
  ~HeldRun() {
    if (run_) engine_->cancel(run_);
  }

  // From now on the memory that the run works on lives as long.
  void hold(nb::object keep) { keep_ = std::move(keep); }
  int status() const { return static_cast<int>(run_->status.load(std::memory_order_acquire)); }
  bool wait(double timeout_s) const {
    if (run_->ended()) return true;
    nb::gil_scoped_release released;
    return engine_->wait(*run_, timeout_s);
  }
  std::vector<std::uint32_t> peers() const { return engine_->awaited_peers(*run_); }
  std::pair<std::uint32_t, std::string> failure() const { return {run_->failure.rank, run_->failure.text}; }
  nb::bytes records() const { return nb::bytes(run_->records.data(), run_->records.size()); }

 private:
  std::shared_ptr<Engine> engine_;
  std::shared_ptr<Run> run_;
  nb::object keep_;
};

HeldRun started(std::shared_ptr<Engine> engine, std::shared_ptr<Run> run, nb::object keep, bool awaited,
                std::size_t bytes) {
  engine->post(run, awaited, bytes <= kHereBytes);
  return HeldRun(std::move(engine), std::move(run), std::move(keep));
}

HeldRun message(std::shared_ptr<Engine> engine, std::uint32_t group, std::uint32_t peer, Address data,
                std::size_t bytes, bool sends, nb::object keep) {
  auto run = std::make_shared<Run>(Run::Kind::kMessage, group);
  run->peer = peer;
  run->data = reinterpret_cast<char*>(data);
  run->bytes = bytes;
  run->sends = sends;
  return started(std::move(engine), std::move(run), std::move(keep), false, sends ? bytes : 0);
}

HeldRun exchange(std::shared_ptr<Engine> engine, std::uint32_t group, nb::bytes record, bool awaited) {
  auto run = std::make_shared<Run>(Run::Kind::kExchange, group);
  run->record.assign(record.c_str(), record.size());
  return started(std::move(engine), std::move(run), nb::none(), awaited, record.size());
}

HeldRun launch(std::shared_ptr<Engine> engine, std::uint32_t group, nb::bytes record,
               std::optional<std::pair<std::size_t, bool>> few, std::shared_ptr<const Program> program,
               const Operand& operand, nb::object keep, bool awaited) {
  auto run = std::make_shared<Run>(Run::Kind::kLaunch, group);
  run->record.assign(record.c_str(), record.size());
  if (few) run->few = std::make_unique<Few>(Few{few->first, few->second});
  if (program) operand.require_fit(*program);
  run->program = std::move(program);
  run->operand = operand;
  // Without an announcement the numbers are sent at once.
  const std::size_t bytes = run->few || record.size() ? 0 : operand.numel * operand.item_bytes();
  return started(std::move(engine), std::move(run), std::move(keep), awaited, bytes);
}

// An allreduce of few numbers from its announcement to its end, in one call: 0 once it is done, else the run, which has
// not ended within `patience_us`, or not well.
nb::object allreduce_few(const std::shared_ptr<Engine>& engine, std::uint64_t signature, std::uint64_t sequence,
                         Address data, std::uint32_t group, std::size_t numel, int dtype, int op, double divisor,
                         std::size_t share_bytes, bool to_each, double patience_us) {
  auto run = std::make_shared<Run>(Run::Kind::kLaunch, group);
  run->record = announcement(signature, sequence);
  run->few = std::make_unique<Few>(Few{share_bytes, to_each});
  run->operand = make_operand(data, numel, dtype, op, divisor, false, 0, 0, 0, true);
  {
    nb::gil_scoped_release released;
    engine->post(run, /*awaited=*/true, /*here=*/true);
    engine->wait(*run, patience_us * 1e-6);
  }
  if (run->status.load(std::memory_order_acquire) == Status::kDone) return nb::int_(0);
  return nb::cast(HeldRun(engine, std::move(run), nb::none()));
}

// The same by the short way of `leaders`: 0 once it is done, 1: not within `patience_us`, 2: by the long way.
int allreduce_by_leaders(Leaders& leaders, std::uint64_t signature, std::uint64_t sequence, Address data,
                         std::size_t numel, int dtype, int op, double divisor, std::size_t share_bytes, bool to_each,
                         double patience_us) {
  const Operand known = make_operand(data, numel, dtype, op, divisor, false, 0, 0, 0, true);
  nb::gil_scoped_release released;
  leaders.begin(
      {signature, sequence, known.buffer, numel, known.dtype, known.op, divisor, {share_bytes, to_each}, nullptr});
  return static_cast<int>(leaders.wait(patience_us));
}

// `pieces`: start, place among the sums and length of each; `bounds`: of the shares, all in numbers of `item_bytes`.
std::shared_ptr<const Shares> make_shares(nb::bytes pieces, nb::bytes bounds, std::size_t item_bytes, bool to_each) {
  auto made = std::make_shared<Shares>();
  made->few.bounds = numbers_of<std::size_t>(bounds);
  if (made->few.bounds.empty() || made->few.bounds.front() != 0 ||
      !std::is_sorted(made->few.bounds.begin(), made->few.bounds.end()))
    throw std::invalid_argument("shares follow each other");
  const std::size_t numel = made->few.bounds.back();
  const auto table = numbers_of<std::size_t>(pieces);
  if (table.size() % 3 != 0) throw std::invalid_argument("a piece has three numbers");
  for (std::size_t at = 0; at < table.size(); at += 3) {
    const Shares::Piece piece{table[at], table[at + 1], table[at + 2]};
    if (piece.numel > numel || piece.start > numel - piece.numel || piece.at > numel - piece.numel)
      throw std::invalid_argument("a piece reaches outside the tensor");
    made->pieces.push_back(piece);
  }
  for (std::size_t& bound : made->few.bounds) bound *= item_bytes;
  made->few.to_each = to_each;
  return made;
}

// The same of more numbers, as `shares` deal them out.
int allreduce_shares_by_leaders(Leaders& leaders, std::uint64_t signature, std::uint64_t sequence, Address data,
                                std::size_t numel, int dtype, int op, double divisor,
                                std::shared_ptr<const Shares> shares, double patience_us) {
  const Operand known = make_operand(data, numel, dtype, op, divisor, false, 0, 0, 0, true);
  if (shares->few.bounds.back() != numel * known.item_bytes())
    throw std::invalid_argument("the shares are those of another tensor");
  nb::gil_scoped_release released;
  leaders.begin({signature, sequence, known.buffer, numel, known.dtype, known.op, divisor, {}, std::move(shares)});
  return static_cast<int>(leaders.wait(patience_us));
}

std::unique_ptr<Leaders> make_leaders(std::shared_ptr<Engine> engine, std::uint32_t group, std::uint32_t between,
                                      std::vector<std::uint32_t> node, std::size_t me, const NodeSync* window,
                                      const std::vector<Address>& areas, std::size_t area_bytes, double spin_us,
                                      double late_us) {
  std::vector<Page*> pages;
  for (std::size_t rank = 0; window && rank < window->size(); ++rank) pages.push_back(&window->page(rank));
  std::vector<char*> memory;
  for (const Address area : areas) memory.push_back(reinterpret_cast<char*>(area));
  return std::make_unique<Leaders>(std::move(engine), group, between, std::move(node), me, std::move(pages),
                                   std::move(memory), area_bytes, spin_us, late_us);
}

}  // namespace

void register_links(nb::module_& m) {
  m.attr("LINKS_FRAME_BYTES") = kFrameBytes;
  m.attr("LINKS_FIRST_BYTES") = kFirstBytes;
  m.def("links_interfaces", [] {
    std::vector<std::tuple<std::string, std::string, bool>> found;
    for (const Interface& each : interfaces()) found.emplace_back(each.name, each.address, each.loopback);
    return found;
  });
  m.def("crc32c", [](nb::bytes data, std::uint32_t crc) { return crc32c(crc, data.c_str(), data.size()); });
  m.def("has_crc32c", [](int way) { return has_crc32c(static_cast<Crc32cWay>(way)); });
  m.def("crc32c_by", [](int way, nb::bytes data, std::uint32_t crc) {
    if (!has_crc32c(static_cast<Crc32cWay>(way))) throw nb::value_error("the processor lacks this way");
    return crc32c_by(static_cast<Crc32cWay>(way), crc, data.c_str(), data.size());
  });

  // Held by shared pointers here: a run outlives the Python object that made its program.
  struct HeldProgram {
    std::shared_ptr<const Program> program;
  };
  struct HeldEngine {
    std::shared_ptr<Engine> engine;
    std::shared_ptr<Keeper> keeper;
  };
  struct HeldShares {
    std::shared_ptr<const Shares> shares;
  };
  nb::class_<HeldShares>(m, "LinksShares")
      .def("__init__", [](HeldShares* self, nb::bytes pieces, nb::bytes bounds, std::size_t item_bytes, bool to_each) {
        new (self) HeldShares{make_shares(pieces, bounds, item_bytes, to_each)};
      });
  nb::class_<HeldProgram>(m, "LinksProgram")
      .def("__init__",
           [](HeldProgram* self, nb::bytes rows, nb::bytes first, nb::bytes after, std::size_t numel,
              std::size_t ranks) { new (self) HeldProgram{make_program(rows, first, after, numel, ranks)}; });
  nb::class_<Operand>(m, "LinksOperand")
      .def("__init__", [](Operand* self, Address buffer, std::size_t numel, int dtype, int op, double divisor,
                          bool divides_first, Address wide, std::size_t own_start, std::size_t own_numel, bool rounds) {
        new (self)
            Operand(make_operand(buffer, numel, dtype, op, divisor, divides_first, wide, own_start, own_numel, rounds));
      });
  nb::class_<HeldRun>(m, "LinksRun")
      .def("hold", &HeldRun::hold)
      .def("status", &HeldRun::status)
      .def("wait", &HeldRun::wait)
      .def("peers", &HeldRun::peers)
      .def("failure", &HeldRun::failure)
      .def("records", &HeldRun::records);
  nb::class_<Leaders>(m, "LinksLeaders")
      .def("allreduce", &allreduce_by_leaders)
      .def("allreduce_shares",
           [](Leaders& self, std::uint64_t signature, std::uint64_t sequence, Address data, std::size_t numel,
              int dtype, int op, double divisor, const HeldShares& shares, double patience_us) {
             return allreduce_shares_by_leaders(self, signature, sequence, data, numel, dtype, op, divisor,
                                                shares.shares, patience_us);
           })
      .def(
          "wait", [](Leaders& self, double timeout_us) { return static_cast<int>(self.wait(timeout_us)); },
          nb::call_guard<nb::gil_scoped_release>())
      .def("peers", &Leaders::peers, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<HeldEngine>(m, "LinksEngine")
      .def(
          "__init__",
          [](HeldEngine* self, std::uint32_t rank, const std::vector<int>& fds, bool checks, double look_us,
             bool keeper) {
            new (self) HeldEngine{std::make_shared<Engine>(rank, fds, checks, look_us),
                                  keeper ? Keeper::of_this_process() : nullptr};
          },
          nb::arg("rank"), nb::arg("fds"), nb::arg("checks"), nb::arg("look_us"), nb::arg("keeper") = false)
      .def("keeper", [](const HeldEngine& self) { return self.keeper ? self.keeper->pid() : 0; })
      .def("add_group", [](HeldEngine& self, std::uint32_t id,
                           const std::vector<std::uint32_t>& ranks) { self.engine->add_group(id, ranks); })
      .def("set_nodes", [](HeldEngine& self, std::uint32_t id,
                           std::vector<std::vector<std::size_t>> nodes) { self.engine->set_nodes(id, nodes); })
      .def(
          "leaders",
          [](const HeldEngine& self, std::uint32_t group, std::uint32_t between, std::vector<std::uint32_t> node,
             std::size_t me, const NodeSync* window, const std::vector<Address>& areas, std::size_t area_bytes,
             double spin_us, double late_us) {
            return make_leaders(self.engine, group, between, std::move(node), me, window, areas, area_bytes, spin_us,
                                late_us);
          },
          nb::arg("group"), nb::arg("between"), nb::arg("node"), nb::arg("me"), nb::arg("window").none(),
          nb::arg("areas"), nb::arg("area_bytes"), nb::arg("spin_us"), nb::arg("late_us"), nb::keep_alive<0, 6>())
      .def("remove_group", [](HeldEngine& self, std::uint32_t id) { self.engine->remove_group(id); })
      .def("leave",
           [](HeldEngine& self, double timeout_s) {
             std::shared_ptr<Keeper> keeper = std::move(self.keeper);
             nb::gil_scoped_release released;
             self.engine->leave(timeout_s);
             keeper.reset();
           })
      .def("message",
           [](HeldEngine& self, std::uint32_t group, std::uint32_t peer, Address data, std::size_t bytes, bool sends,
              nb::object keep) { return message(self.engine, group, peer, data, bytes, sends, std::move(keep)); })
      .def("allreduce_few",
           [](HeldEngine& self, std::uint64_t signature, std::uint64_t sequence, Address data, std::uint32_t group,
              std::size_t numel, int dtype, int op, double divisor, std::size_t share_bytes, bool to_each,
              double patience_us) {
             return allreduce_few(self.engine, signature, sequence, data, group, numel, dtype, op, divisor, share_bytes,
                                  to_each, patience_us);
           })
      .def("exchange", [](HeldEngine& self, std::uint32_t group, nb::bytes record,
                          bool awaited) { return exchange(self.engine, group, record, awaited); })
      .def(
          "launch",
          [](HeldEngine& self, std::uint32_t group, nb::bytes record, std::optional<std::pair<std::size_t, bool>> few,
             const HeldProgram* program, const Operand& operand, nb::object keep, bool awaited) {
            return launch(self.engine, group, record, few, program ? program->program : nullptr, operand,
                          std::move(keep), awaited);
          },
          nb::arg("group"), nb::arg("record"), nb::arg("few").none(), nb::arg("program").none(), nb::arg("operand"),
          nb::arg("keep").none(), nb::arg("awaited"));
}
