// What the short ways share: Python's objects by few calls of its C API, and the way itself.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>

namespace commlab {

namespace nb = nanobind;

inline PyObject* interned(const char* text) {
  PyObject* made = PyUnicode_InternFromString(text);
  if (!made) throw nb::python_error();
  return made;
}

inline nb::object owned(PyObject* made) {
  if (!made) throw nb::python_error();
  return nb::steal(made);
}

inline nb::object of(PyObject* object, PyObject* name) { return owned(PyObject_GetAttr(object, name)); }

inline nb::object asked(PyObject* callable) { return owned(PyObject_Vectorcall(callable, nullptr, 0, nullptr)); }

template <class... Arguments>
inline nb::object told(PyObject* object, PyObject* name, Arguments... arguments) {
  PyObject* const all[] = {object, arguments...};
  return owned(PyObject_VectorcallMethod(name, all, sizeof...(arguments) + 1, nullptr));
}

inline std::uint64_t number(PyObject* object) {
  const std::uint64_t found = PyLong_AsUnsignedLongLongMask(object);
  if (PyErr_Occurred()) throw nb::python_error();
  return found;
}

inline nb::object number_of(std::uint64_t number) { return owned(PyLong_FromUnsignedLongLong(number)); }

inline Py_ssize_t length(PyObject* object) {
  const Py_ssize_t found = PyObject_Size(object);
  if (found < 0) throw nb::python_error();
  return found;
}

// The entry of a dict, borrowed; nullptr where there is none.
inline PyObject* entry(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw nb::python_error();
  return found;
}

inline PyObject* item(PyObject* tuple, Py_ssize_t at) {
  PyObject* found = PyTuple_GetItem(tuple, at);
  if (!found) throw nb::python_error();
  return found;
}

// Group.at_once() of commlab/runtime/group.py, which says what it does and returns. places: the first is where the
// numbers lie.
bool at_once(PyObject* group, PyObject* signature, PyObject* call, PyObject* kept, PyObject* const* places,
             std::size_t count);
bool is_group(PyObject* object);

}  // namespace commlab
