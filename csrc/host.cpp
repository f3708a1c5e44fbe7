// qpeft_ext._host: what is not a tensor operator. Build info, and packing of ragged token lists.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "build_info.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  for (const auto& [key, value] : kBuildInfo) info[key] = value;
  return info;
}

[[noreturn]] void reject(const std::string& what, py::handle got) {
  throw py::type_error("pack_ragged: " + what + ", got " + std::string(py::str(py::type::of(got).attr("__name__"))));
}

// [[5, 3], [], [7]] -> values [5, 3, 7], offsets [0, 2, 2, 3] (CSR): row i is values[offsets[i]:offsets[i + 1]].
// PySequence_Fast hands out lists and tuples as they are, so nothing is copied but the numbers themselves.
py::tuple pack_ragged(const py::object& lists) {
  const auto as_sequence = [](py::handle object, const std::string& name) {
    if (PyUnicode_Check(object.ptr()) || PyBytes_Check(object.ptr()) || !PySequence_Check(object.ptr()))
      reject(name + " must be a list of int" + (name == "lists" ? " lists" : ""), object);
    return py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), "pack_ragged: expected a sequence"));
  };
  const py::object outer = as_sequence(lists, "lists");
  if (!outer) throw py::error_already_set();
  const Py_ssize_t rows = PySequence_Fast_GET_SIZE(outer.ptr());
  py::array_t<int64_t> offsets(rows + 1);
  int64_t* offset = offsets.mutable_data();
  std::vector<py::object> inner(rows);
  offset[0] = 0;
  for (Py_ssize_t i = 0; i < rows; ++i) {
    inner[i] = as_sequence(PySequence_Fast_GET_ITEM(outer.ptr(), i), "lists[" + std::to_string(i) + "]");
    if (!inner[i]) throw py::error_already_set();
    offset[i + 1] = offset[i] + PySequence_Fast_GET_SIZE(inner[i].ptr());
  }
  py::array_t<int64_t> values(offset[rows]);
  int64_t* out = values.mutable_data();
  for (Py_ssize_t i = 0; i < rows; ++i) {
    PyObject** items = PySequence_Fast_ITEMS(inner[i].ptr());
    for (int64_t j = 0, n = offset[i + 1] - offset[i]; j < n; ++j) {
      const auto name = [&] { return "lists[" + std::to_string(i) + "][" + std::to_string(j) + "]"; };
      if (PyBool_Check(items[j]) || !PyIndex_Check(items[j])) reject(name() + " must be an int", items[j]);
      *out = PyLong_AsLongLong(items[j]);
      if (*out++ == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        throw py::value_error("pack_ragged: " + name() + " must fit in 64 bits, got " + std::string(py::str(items[j])));
      }
    }
  }
  return py::make_tuple(values, offsets);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of qpeft_ext.";
  m.def("build_info", &build_info, "How this copy of qpeft_ext was built: compiler, flags, CUDA decision and its reason, torch.");
  m.def("pack_ragged", &pack_ragged, py::arg("lists"),
        "Pack a list of int lists into CSR arrays: (values int64 [N], offsets int64 [rows + 1]).");
}
