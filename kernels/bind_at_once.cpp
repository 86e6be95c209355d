// The short way of an operation: all that stands between its caller and the one native call that it is. The same steps
// in Python cost three times what the call itself takes with few numbers in the window.
#include "bind_at_once.h"

#include <stdexcept>

namespace nb = nanobind;
using namespace commlab;

namespace {

constexpr std::size_t kMostPlaces = 2, kMostArguments = 24;

// What is asked of Python's objects, by name. Never freed.
struct Names {
  PyObject *window = interned("window"), *agreement = interned("agreement"), *required = interned("required"),
           *ended = interned("ended"), *hash = interned("hash"), *standing = interned("standing"),
           *spans = interned("_spans"), *broke_off = interned("_broke_off"), *rest = interned("_rest"),
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

}  // namespace

bool commlab::is_group(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == watched.group; }

bool commlab::at_once(PyObject* group, PyObject* signature, PyObject* call, PyObject* kept, PyObject* const* places,
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
      "at_once",
      [](nb::handle group, nb::handle signature, nb::handle call, nb::handle kept, nb::handle address,
         nb::handle second) {
        PyObject* const places[] = {address.ptr(), second.ptr()};
        return at_once(group.ptr(), signature.ptr(), call.ptr(), kept.ptr(), places, second.is_none() ? 1 : 2);
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none());
}
