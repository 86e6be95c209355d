// The short way of an operation: all that stands between its caller and the one native call that it is. The same steps
// in Python cost three times what the call itself takes with few numbers in the window.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "dlpack.h"

namespace nb = nanobind;
using namespace commlab;

namespace {

constexpr std::size_t kMostPlaces = 2, kMostArguments = 24, kMostDimensions = 16;

PyObject* interned(const char* text) {
  PyObject* made = PyUnicode_InternFromString(text);
  if (!made) throw nb::python_error();
  return made;
}

// What is asked of Python's objects, by name. Never freed.
struct Names {
  PyObject *window = interned("window"), *agreement = interned("agreement"), *required = interned("required"),
           *ended = interned("ended"), *hash = interned("hash"), *standing = interned("standing"),
           *spans = interned("_spans"), *world = interned("_world"), *calls = interned("known_calls"),
           *is_neg = interned("is_neg"), *broke_off = interned("_broke_off"), *rest = interned("_rest"),
           *wait = interned("wait"), *patience = interned("PATIENCE_US"),
           *patience_for_others = interned("PATIENCE_FOR_OTHERS_US");
};

const Names& names() {
  static const Names* made = new Names;
  return *made;
}

// commlab/runtime/at_once.py, what watches this process's calls, what other work is under way, and the class of groups.
struct Watched {
  PyObject *settings, *trace, *modes, *tracing, *under_way, *group;
} watched{};

// What an allreduce needs of torch and of the group of all ranks.
struct Torch {
  PyObject *tensor, *parameter, *writable_pages, *may_write, *count_write, *world;
  std::size_t page_bits;
  DLTensorFrom exchange;
} torch{};

// Where a group stands on this rank: how many operations it has begun, what they have sent, read and written, and what
// keeps two of them from being begun at once (commlab/runtime/progress.py).
struct Standing {
  std::uint64_t sequence = 0;
  std::int64_t bytes_sent = 0, messages_sent = 0, node_bytes_read = 0, node_bytes_written = 0;
  PyObject* in_call = nullptr;  // the signature of the operation that a thread does in a native call, borrowed
  nb::object progress, queue, acquire, release;
};

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  const Standing& standing = *nb::inst_ptr<Standing>(self);
  Py_VISIT(standing.progress.ptr());
  Py_VISIT(standing.queue.ptr());
  Py_VISIT(standing.acquire.ptr());
  Py_VISIT(standing.release.ptr());
  return 0;
}

int clear(PyObject* self) {
  Standing& standing = *nb::inst_ptr<Standing>(self);
  standing.progress.reset();
  standing.queue.reset();
  standing.acquire.reset();
  standing.release.reset();
  return 0;
}

PyType_Slot slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)}, {Py_tp_clear, reinterpret_cast<void*>(clear)}, {0, nullptr}};

nb::object owned(PyObject* made) {
  if (!made) throw nb::python_error();
  return nb::steal(made);
}

nb::object of(PyObject* object, PyObject* name) { return owned(PyObject_GetAttr(object, name)); }

nb::object asked(PyObject* callable) { return owned(PyObject_Vectorcall(callable, nullptr, 0, nullptr)); }

template <class... Arguments>
nb::object told(PyObject* object, PyObject* name, Arguments... arguments) {
  PyObject* const all[] = {object, arguments...};
  return owned(PyObject_VectorcallMethod(name, all, sizeof...(arguments) + 1, nullptr));
}

std::uint64_t number(PyObject* object) {
  const std::uint64_t found = PyLong_AsUnsignedLongLongMask(object);
  if (PyErr_Occurred()) throw nb::python_error();
  return found;
}

nb::object number_of(std::uint64_t number) { return owned(PyLong_FromUnsignedLongLong(number)); }

Py_ssize_t length(PyObject* object) {
  const Py_ssize_t found = PyObject_Size(object);
  if (found < 0) throw nb::python_error();
  return found;
}

// The entry of a dict, borrowed; nullptr where there is none.
PyObject* entry(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw nb::python_error();
  return found;
}

PyObject* item(PyObject* tuple, Py_ssize_t at) {
  PyObject* found = PyTuple_GetItem(tuple, at);
  if (!found) throw nb::python_error();
  return found;
}

// Whether something sees what this thread calls: a trace, one of torch's modes, torch.jit.trace.
bool seen() {
  const PyObject* spans = entry(watched.trace, names().spans);
  if (spans && spans != Py_None) return true;
  return number(asked(watched.modes).ptr()) != 0 || asked(watched.tracing).ptr() != Py_None;
}

// Progress.take(): nothing is under way, operations are taken, and nothing starts before it is released again.
class Taken {
 public:
  explicit Taken(const Standing& standing) : standing_(standing) {
    if (!standing.progress.is_valid() || length(standing.queue.ptr()) != 0) return;
    if (of(standing.progress.ptr(), names().ended).ptr() != Py_None) return;
    PyObject* const all[] = {Py_False};
    taken_ = owned(PyObject_Vectorcall(standing.acquire.ptr(), all, 1, nullptr)).ptr() == Py_True;
    if (taken_ && length(standing.queue.ptr()) != 0) release();
  }
  ~Taken() {
    if (!taken_) return;
    // In a function that is left with an error the error stays.
    nb::error_scope kept;
    Py_XDECREF(PyObject_Vectorcall(standing_.release.ptr(), nullptr, 0, nullptr));
  }
  Taken(const Taken&) = delete;
  Taken& operator=(const Taken&) = delete;

  explicit operator bool() const { return taken_; }
  void release() {
    taken_ = false;
    asked(standing_.release.ptr());
  }

 private:
  const Standing& standing_;
  bool taken_ = false;
};

// While it lives, the group says which operation this thread does in a native call.
class InCall {
 public:
  InCall(Standing& standing, PyObject* signature) : standing_(standing) { standing_.in_call = signature; }
  ~InCall() { standing_.in_call = nullptr; }
  InCall(const InCall&) = delete;
  InCall& operator=(const InCall&) = delete;

 private:
  Standing& standing_;
};

// Group.at_once(): what it does and returns is said there.
bool at_once(PyObject* group, PyObject* signature, PyObject* call, PyObject* kept, PyObject* const* places,
             std::size_t count) {
  if (of(group, names().window).ptr() == Py_None &&
      of(of(group, names().agreement).ptr(), names().required).ptr() != Py_True)
    return false;
  PyObject* const arguments = item(call, 1);
  const auto own = static_cast<std::size_t>(length(arguments));
  if (own > kMostArguments || count > kMostPlaces) throw std::invalid_argument("a call of too many arguments");
  if (seen()) return false;
  const nb::object held = of(group, names().standing);
  Standing& standing = *nb::inst_ptr<Standing>(held);
  Taken taken(standing);
  if (!taken) return false;
  const nb::object sequence = number_of(++standing.sequence);
  nb::object rest;
  try {
    const InCall in_call(standing, signature);
    const nb::object hash = of(signature, names().hash);
    PyObject* const patience =
        entry(watched.settings, length(watched.under_way) != 0 ? names().patience_for_others : names().patience);
    PyObject* given[kMostArguments + kMostPlaces + 3];
    std::size_t filled = 0;
    given[filled++] = hash.ptr();
    given[filled++] = sequence.ptr();
    given[filled++] = places[0];
    for (std::size_t at = 0; at < own; ++at) given[filled++] = item(arguments, static_cast<Py_ssize_t>(at));
    for (std::size_t at = 1; at < count; ++at) given[filled++] = places[at];
    given[filled++] = patience;
    const nb::object left = owned(PyObject_Vectorcall(item(call, 0), given, filled, nullptr));
    if (PyObject* counts = entry(item(call, 3), left.ptr())) {
      standing.bytes_sent += static_cast<std::int64_t>(number(item(counts, 0)));
      standing.messages_sent += static_cast<std::int64_t>(number(item(counts, 1)));
      standing.node_bytes_read += static_cast<std::int64_t>(number(item(counts, 2)));
      standing.node_bytes_written += static_cast<std::int64_t>(number(item(counts, 3)));
    } else {
      rest = told(group, names().rest, call, signature, sequence.ptr(), kept, left.ptr());
    }
  } catch (nb::python_error& error) {
    told(group, names().broke_off, signature, sequence.ptr(), error.value().ptr());
    throw;
  }
  taken.release();
  if (rest.is_valid()) told(rest.ptr(), names().wait);
  return true;
}

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
  if (!group || reinterpret_cast<PyObject*>(Py_TYPE(group)) != watched.group) return false;
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

void register_at_once(nb::module_& m) {
  nb::class_<Standing>(m, "Standing", nb::type_slots(slots))
      .def(nb::init<>())
      .def_rw("sequence", &Standing::sequence)
      .def_rw("bytes_sent", &Standing::bytes_sent)
      .def_rw("messages_sent", &Standing::messages_sent)
      .def_rw("node_bytes_read", &Standing::node_bytes_read)
      .def_rw("node_bytes_written", &Standing::node_bytes_written)
      .def_prop_ro("in_call", [](const Standing& self) { return self.in_call ? nb::borrow(self.in_call) : nb::none(); })
      .def("attach", [](Standing& self, nb::object progress, nb::object queue, nb::object acquire, nb::object release) {
        self.progress = std::move(progress);
        self.queue = std::move(queue);
        self.acquire = std::move(acquire);
        self.release = std::move(release);
      });
  m.def("watch_calls", [](nb::handle settings, nb::handle trace, nb::handle modes, nb::handle tracing,
                          nb::handle under_way, nb::handle group) {
    watched = {settings.inc_ref().ptr(), trace.inc_ref().ptr(),     modes.inc_ref().ptr(),
               tracing.inc_ref().ptr(),  under_way.inc_ref().ptr(), group.inc_ref().ptr()};
  });
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
  m.def(
      "at_once",
      [](nb::handle group, nb::handle signature, nb::handle call, nb::handle kept, nb::handle address,
         nb::handle second) {
        PyObject* const places[] = {address.ptr(), second.ptr()};
        return at_once(group.ptr(), signature.ptr(), call.ptr(), kept.ptr(), places, second.is_none() ? 1 : 2);
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none());
}
