// commlab._native: raw addresses in, nothing kept. Knows memory, not torch, so one build serves every torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_codes.h"
#include "cpu/isa.h"
#include "cpu/pack.h"

namespace nb = nanobind;
using namespace commlab;

namespace {

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

DType checked(int dtype, bool allowed) {
  if (dtype < 0 || dtype > 5 || !allowed)
    throw std::invalid_argument("dtype code " + std::to_string(dtype) + " is not supported by this operation");
  return static_cast<DType>(dtype);
}

DType any_dtype(int dtype) { return checked(dtype, true); }
DType float_dtype(int dtype) { return checked(dtype, is_float(static_cast<DType>(dtype))); }
DType dtype_16bit(int dtype) { return checked(dtype, is_16bit(static_cast<DType>(dtype))); }

// Runs fn without the GIL, unless it is over before another thread could take it: below 64 KiB the
// work takes a few microseconds, while getting the GIL back from a busy thread takes up to 5 ms.
template <class Fn>
void without_gil(std::size_t numel, DType dtype, Fn fn) {
  if (numel * dtype_bytes(dtype) < 64 * 1024) return fn();
  nb::gil_scoped_release released;
  fn();
}

// Who finalizes MPI when the interpreter has ended: the process that started it, and never one that it has forked,
// which the launcher would take for that process.
struct MpiAtExit {
  int (*initialized)(int*) = nullptr;
  int (*finalized)(int*) = nullptr;
  int (*finalize)() = nullptr;
  bool ours = false;  // nobody else finalizes MPI at exit
  pid_t owner = 0;
  int child_status = 0;
} mpi_at_exit;

void end_mpi() {
  if (getpid() != mpi_at_exit.owner) {
    if (mpi_at_exit.ours) return;
    // mpi4py, whose turn is next, would finalize MPI.
    std::fflush(nullptr);
    _exit(mpi_at_exit.child_status);
  }
  int started = 0, ended = 1;
  if (!mpi_at_exit.ours) return;
  if (mpi_at_exit.initialized(&started) || !started || mpi_at_exit.finalized(&ended) || ended) return;
  mpi_at_exit.finalize();
}

void finalize_mpi_at_exit(Address initialized, Address finalized, Address finalize, bool ours) {
  if (mpi_at_exit.owner) return;
  mpi_at_exit = {reinterpret_cast<int (*)(int*)>(initialized),
                 reinterpret_cast<int (*)(int*)>(finalized),
                 reinterpret_cast<int (*)()>(finalize),
                 ours,
                 getpid(),
                 0};
  if (Py_AtExit(&end_mpi) < 0) throw std::runtime_error("no room for a function at the interpreter's end");
}

// The tensors of one bucket and their places on the wire. Only their addresses may change afterwards.
class PackPlan {
 public:
  PackPlan(const std::vector<std::size_t>& numels, const std::vector<std::size_t>& starts,
           const std::vector<int>& dtypes, int wire_dtype)
      : wire_dtype_(float_dtype(wire_dtype)) {
    if (numels.size() != starts.size() || numels.size() != dtypes.size())
      throw std::invalid_argument("a plan needs as many starts and dtypes as tensors");
    for (std::size_t i = 0; i < numels.size(); ++i) {
      const DType dtype = float_dtype(dtypes[i]);
      if (!can_pack(dtype, wire_dtype_)) throw std::invalid_argument("an fp64 wire carries fp64 tensors only");
      pieces_.push_back({nullptr, numels[i], starts[i], dtype});
      numel_ += numels[i];
    }
  }

  void set_addresses(const std::vector<Address>& addresses) {
    if (addresses.size() != pieces_.size()) throw std::invalid_argument("a plan needs one address per tensor");
    for (std::size_t i = 0; i < addresses.size(); ++i) pieces_[i].address = at(addresses[i]);
  }

  bool pack(Address wire, double scale) const {
    bool finite = true;
    without_gil(numel_, wire_dtype_,
                [&] { finite = commlab::pack(pieces_.data(), pieces_.size(), at(wire), wire_dtype_, scale); });
    return finite;
  }

  void unpack(Address wire, double scale) const {
    without_gil(numel_, wire_dtype_,
                [&] { commlab::unpack(pieces_.data(), pieces_.size(), at(wire), wire_dtype_, scale); });
  }

 private:
  std::vector<Piece> pieces_;
  DType wire_dtype_;
  std::size_t numel_ = 0;
};

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa set : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
    if (has_isa(set)) names.push_back(isa_name(set));
  return names;
}

void set_isa_by_name(const std::string& name) {
  for (Isa set : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
    if (name == isa_name(set) && set_isa(set)) return;
  throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

}  // namespace

#ifdef COMMLAB_WINDOW
void register_window(nb::module_& m);    // bind_window.cpp
void register_node(nb::module_& m);      // bind_node.cpp
void register_at_once(nb::module_& m);   // bind_at_once.cpp
void register_known(nb::module_& m);     // bind_known.cpp
void register_watchdog(nb::module_& m);  // bind_watchdog.cpp
void register_links(nb::module_& m);     // bind_links.cpp
#endif
#ifdef COMMLAB_CUDA
void register_cuda(nb::module_& m);  // bind_cuda.cpp
#endif

NB_MODULE(_native, m) {
  m.def("reduce", [](Address dst, Address src, std::size_t numel, int dtype, int op) {
    const DType d = any_dtype(dtype);
    const Op o = op_of(op);
    without_gil(numel, d, [=] { reduce_loops().reduce(at(dst), at(src), numel, d, o); });
  });
  m.def("accumulate", [](Address dst, Address src, std::size_t numel, int dtype, int op) {
    const DType d = dtype_16bit(dtype);
    const Op o = op_of(op);
    without_gil(numel, d, [=] { reduce_loops().accumulate(at<float>(dst), at(src), numel, d, o); });
  });
  m.def("widen", [](Address dst, Address src, std::size_t numel, int dtype) {
    const DType d = dtype_16bit(dtype);
    without_gil(numel, d, [=] { reduce_loops().widen(at<float>(dst), at(src), numel, d); });
  });
  m.def("narrow", [](Address dst, Address src, std::size_t numel, int dtype, float divisor) {
    const DType d = dtype_16bit(dtype);
    without_gil(numel, d, [=] { reduce_loops().narrow(at(dst), at<float>(src), numel, d, divisor); });
  });
  m.def("scale", [](Address dst, std::size_t numel, int dtype, double factor) {
    const DType d = float_dtype(dtype);
    without_gil(numel, d, [=] { reduce_loops().scale(at(dst), numel, d, factor); });
  });
  m.def("divide", [](Address dst, std::size_t numel, int dtype, double divisor) {
    const DType d = float_dtype(dtype);
    without_gil(numel, d, [=] { reduce_loops().divide(at(dst), numel, d, divisor); });
  });
  nb::class_<PackPlan>(m, "PackPlan")
      .def(nb::init<const std::vector<std::size_t>&, const std::vector<std::size_t>&, const std::vector<int>&, int>())
      .def("set_addresses", &PackPlan::set_addresses)
      .def("pack", &PackPlan::pack)
      .def("unpack", &PackPlan::unpack);
  m.def("finalize_mpi_at_exit", &finalize_mpi_at_exit);
  m.def("set_child_exit_status", [](int status) { mpi_at_exit.child_status = status; });
  m.def("isa", [] { return std::string(isa_name(isa())); });
  m.def("set_isa", &set_isa_by_name);
  m.def("isa_names", &isa_names);
#ifdef COMMLAB_WINDOW
  register_window(m);
  register_node(m);
  register_at_once(m);
  register_known(m);
  register_watchdog(m);
  register_links(m);
#endif
#ifdef COMMLAB_CUDA
  register_cuda(m);
#else
  m.attr("CUDA_MISSING") = COMMLAB_CUDA_MISSING;
#endif
}
