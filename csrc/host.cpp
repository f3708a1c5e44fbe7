// qpeft_ext._host: build info, and packing of ragged token lists; these are no tensor operators.
// Written for Python's limited API, so that one file serves every Python version from 3.11 on.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "build_info.h"

namespace {

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;  // nullptr: a Python error is set

PyObject* build_info(PyObject*, PyObject*) {
  Owned info(PyDict_New());
  for (const auto& [key, value] : kBuildInfo) {
    const Owned text(PyUnicode_FromString(value));
    if (!info || !text || PyDict_SetItemString(info.get(), key, text.get()) < 0) return nullptr;
  }
  return info.release();
}

std::nullptr_t reject(const std::string& what, PyObject* got) {
  const Owned name(PyType_GetName(Py_TYPE(got)));
  if (name) PyErr_Format(PyExc_TypeError, "pack_ragged: %s, got %U", what.c_str(), name.get());
  return nullptr;
}

// A list or tuple as it is, so that nothing is copied but the numbers themselves; another sequence as a list.
Owned as_sequence(PyObject* object, const std::string& name, const char* what) {
  if (PyUnicode_Check(object) || PyBytes_Check(object) || !PySequence_Check(object))
    return Owned(reject(name + " must be " + what, object));
  return Owned(PySequence_Fast(object, "pack_ragged: expected a sequence"));
}

Py_ssize_t length(PyObject* sequence) {
  return PyList_Check(sequence) ? PyList_Size(sequence) : PyTuple_Size(sequence);
}

PyObject* borrow(PyObject* sequence, Py_ssize_t i) {  // nullptr where the sequence has become shorter meanwhile
  return PyList_Check(sequence) ? PyList_GetItem(sequence, i) : PyTuple_GetItem(sequence, i);
}

// A new numpy array of `size` int64, filled by `fill(data)`, which returns false after an error.
template <typename Fill>
Owned int64_array(PyObject* numpy, Py_ssize_t size, Fill fill) {
  Owned array(PyObject_CallMethod(numpy, "empty", "ns", size, "int64"));
  Py_buffer view;
  if (!array || PyObject_GetBuffer(array.get(), &view, PyBUF_WRITABLE) < 0) return nullptr;
  const bool filled = fill(static_cast<int64_t*>(view.buf));
  PyBuffer_Release(&view);
  return filled ? std::move(array) : nullptr;
}

bool read_number(PyObject* item, int64_t* out, Py_ssize_t i, Py_ssize_t j) {
  const auto name = [&] { return "lists[" + std::to_string(i) + "][" + std::to_string(j) + "]"; };
  if (PyBool_Check(item) || !PyIndex_Check(item)) return reject(name() + " must be an int", item), false;
  *out = PyLong_AsLongLong(item);
  if (*out == -1 && PyErr_Occurred()) {
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
      PyErr_Clear();
      PyErr_Format(PyExc_ValueError, "pack_ragged: %s must fit in 64 bits, got %S", name().c_str(), item);
    }
    return false;
  }
  return true;
}

// [[5, 3], [], [7]] -> values [5, 3, 7], offsets [0, 2, 2, 3] (CSR): row i is values[offsets[i]:offsets[i + 1]].
PyObject* pack_ragged(PyObject*, PyObject* lists) {
  const Owned numpy(PyImport_ImportModule("numpy"));
  const Owned outer = numpy ? as_sequence(lists, "lists", "a list of int lists") : nullptr;
  if (!outer) return nullptr;
  const Py_ssize_t rows = length(outer.get());
  std::vector<Owned> inner(rows);
  std::vector<Py_ssize_t> lengths(rows);
  Py_ssize_t total = 0;
  Owned offsets = int64_array(numpy.get(), rows + 1, [&](int64_t* offset) {
    offset[0] = 0;
    for (Py_ssize_t i = 0; i < rows; ++i) {
      const Owned row(Py_XNewRef(borrow(outer.get(), i)));
      if (row) inner[i] = as_sequence(row.get(), "lists[" + std::to_string(i) + "]", "a list of int");
      if (!inner[i]) return false;
      lengths[i] = length(inner[i].get());
      offset[i + 1] = total += lengths[i];
    }
    return true;
  });
  if (!offsets) return nullptr;
  Owned values = int64_array(numpy.get(), total, [&](int64_t* out) {
    for (Py_ssize_t i = 0; i < rows; ++i)
      for (Py_ssize_t j = 0; j < lengths[i]; ++j) {
        const Owned item(Py_XNewRef(borrow(inner[i].get(), j)));  // its __index__ may drop it from the list
        if (!item || !read_number(item.get(), out++, i, j)) return false;
      }
    return true;
  });
  return values ? PyTuple_Pack(2, values.get(), offsets.get()) : nullptr;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "How this copy of qpeft_ext was built: compiler, flags, CUDA decision and its reason, torch."},
    {"pack_ragged", pack_ragged, METH_O,
     "Pack a list of int lists into CSR arrays: (values int64 [N], offsets int64 [rows + 1])."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_host", "Host-side helpers of qpeft_ext.", 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__host() { return PyModuleDef_Init(&module); }
