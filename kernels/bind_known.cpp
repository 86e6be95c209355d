// An allreduce like one before, from its caller to the result: found again by what the tensor is now and by the words
// of the call (commlab/collectives/known.py).
#include <cstring>

#include "bind_at_once.h"
#include "dlpack.h"

namespace nb = nanobind;
using namespace commlab;

namespace {

constexpr std::size_t kMostDimensions = 16;

// What is asked of Python's objects, by name. Never freed.
struct Names {
  PyObject *world = interned("_world"), *calls = interned("known_calls"), *is_neg = interned("is_neg");
};

const Names& names() {
  static const Names* made = new Names;
  return *made;
}

// What an allreduce needs of torch and of the group of all ranks.
struct Torch {
  PyObject *tensor, *parameter, *writable_pages, *may_write, *count_write, *world;
  std::size_t page_bits;
  DLTensorFrom exchange;
} torch{};

bool contiguous(const DLTensor& tensor, std::size_t& numel) {
  std::int64_t expected = 1;
  for (int at = tensor.ndim - 1; at >= 0; --at) {
    if (tensor.shape[at] != 1 && tensor.strides[at] != expected) return false;
    expected *= tensor.shape[at];
  }
  numel = static_cast<std::size_t>(expected);
  return expected > 0;
}

bool writable(std::uintptr_t address) {
  const int found = PySet_Contains(torch.writable_pages, number_of(address >> torch.page_bits).ptr());
  if (found < 0) throw nb::python_error();
  if (found == 1) return true;
  const nb::object whole = number_of(address);
  PyObject* const all[] = {whole.ptr()};
  return owned(PyObject_Vectorcall(torch.may_write, all, 1, nullptr)).ptr() == Py_True;
}

// What a call is found again by: the numbers' dtype and shape, and which objects op, name, algorithm and wire are. 0:
// not to be told.
struct Key {
  std::uint8_t bytes[8 * (5 + kMostDimensions)];
  std::size_t size = 0;

  void add(const void* data, std::size_t count) {
    std::memcpy(bytes + size, data, count);
    size += count;
  }
};

bool described(PyObject* tensor, PyObject* const* words, DLTensor& found, Key& key, std::size_t& numel) {
  if (!torch.exchange) return false;
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != torch.tensor && type != torch.parameter) return false;
  if (torch.exchange(tensor, &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (found.device_type != kDLCPU || !found.data || found.ndim > static_cast<int>(kMostDimensions)) return false;
  if (!contiguous(found, numel)) return false;
  const std::uint64_t dtype = found.dtype.code | found.dtype.bits << 8 | found.dtype.lanes << 16;
  key.add(&dtype, sizeof dtype);
  for (int at = 0; at < 4; ++at) key.add(&words[at], sizeof words[at]);
  key.add(found.shape, sizeof *found.shape * static_cast<std::size_t>(found.ndim));
  return true;
}

nb::object bytes_of(const Key& key) {
  return owned(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key.bytes), static_cast<Py_ssize_t>(key.size)));
}

nb::object allreduce_key(nb::handle tensor, nb::handle op, nb::handle name, nb::handle algorithm, nb::handle wire) {
  PyObject* const words[] = {op.ptr(), name.ptr(), algorithm.ptr(), wire.ptr()};
  DLTensor found;
  Key key;
  std::size_t numel;
  return described(tensor.ptr(), words, found, key, numel) ? bytes_of(key) : nb::none();
}

bool allreduce_at_once(nb::handle tensor, nb::handle op, nb::handle name, nb::handle algorithm, nb::handle wire,
                       nb::handle of_group) {
  PyObject* group = of_group.ptr();
  if (group == Py_None) group = torch.world ? entry(torch.world, names().world) : nullptr;
  if (!group || !is_group(group)) return false;
  PyObject* const words[] = {op.ptr(), name.ptr(), algorithm.ptr(), wire.ptr()};
  DLTensor found;
  Key key;
  std::size_t numel;
  if (!described(tensor.ptr(), words, found, key, numel)) return false;
  PyObject* known = entry(of(group, names().calls).ptr(), bytes_of(key).ptr());
  if (!known || told(tensor.ptr(), names().is_neg).ptr() != Py_False) return false;
  const auto address = reinterpret_cast<std::uintptr_t>(found.data);
  const bool few = item(known, 2) == Py_True, halves = item(known, 3) == Py_True;
  if (!writable(address) || (!few && !writable(address + numel * found.dtype.bits / 8 - 1))) return false;
  const nb::object call = nb::borrow(item(known, 1)), signature = nb::borrow(item(known, 0));
  const nb::object start = number_of(address), none = number_of(0);
  PyObject* const places[] = {start.ptr(), none.ptr()};
  const nb::object kept = halves ? owned(PyTuple_Pack(2, tensor.ptr(), Py_None)) : nb::borrow(tensor);
  const nb::object held = nb::borrow(group);
  if (!at_once(group, signature.ptr(), call.ptr(), kept.ptr(), places, halves ? 2 : 1)) return false;
  const nb::object written = owned(PyTuple_Pack(1, tensor.ptr()));
  PyObject* const all[] = {written.ptr()};
  owned(PyObject_Vectorcall(torch.count_write, all, 1, nullptr));
  return true;
}

}  // namespace

void register_known(nb::module_& m) {
  m.def(
      "know_torch",
      [](nb::handle tensor, nb::handle parameter, nb::handle writable_pages, std::size_t page_bits,
         nb::handle may_write, nb::handle count_write, nb::handle world, nb::handle exchange) {
        torch = {tensor.inc_ref().ptr(),
                 parameter.inc_ref().ptr(),
                 writable_pages.inc_ref().ptr(),
                 may_write.inc_ref().ptr(),
                 count_write.inc_ref().ptr(),
                 world.inc_ref().ptr(),
                 page_bits,
                 nullptr};
        if (exchange.is_none()) return;
        const auto* api =
            static_cast<const DLExchange*>(PyCapsule_GetPointer(exchange.inc_ref().ptr(), "dlpack_exchange_api"));
        if (!api) throw nb::python_error();
        if (api->major == 1) torch.exchange = api->tensor_from;
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
  m.def("allreduce_key", &allreduce_key, nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(),
        nb::arg().none());
  m.def("allreduce_at_once", &allreduce_at_once, nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(),
        nb::arg().none(), nb::arg().none());
}
