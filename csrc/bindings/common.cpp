#include <stdexcept>

#include "bindings.h"
#include "isa.h"

namespace kd {
namespace {

char view_of_nothing;

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "bfloat16") return DType::bfloat16;
  throw py::type_error("dtype is '" + name + "', but must be float32, float64 or bfloat16");
}

}  // namespace

void check_shape(const char* name, const View& view, int64_t rows, int64_t cols) {
  if (!view || (view.rows == rows && view.cols == cols)) return;
  throw py::value_error(std::string(name) + " is " + std::to_string(view.rows) + " x " + std::to_string(view.cols) +
                        ", but must be " + std::to_string(rows) + " x " + std::to_string(cols));
}

void check_dtype(const char* name, const View& view, DType dtype) {
  if (view && view.dtype != dtype) throw py::type_error(std::string(name) + " has the wrong dtype");
}

void check_batch(const char* name, const View& view, const View& like, int64_t cols) {
  check_shape(name, view, like.rows, cols);
  check_dtype(name, view, like.dtype);
  if (view && view.dtype == DType::bfloat16)
    throw py::type_error(std::string(name) + " is bfloat16, but must be float32 or float64");
  const bool contiguous = view.rows * view.cols == 0 || ((view.cols == 1 || view.col_stride == 1) &&
                                                         (view.rows == 1 || view.row_stride == view.cols));
  if (view && !contiguous) throw py::value_error(std::string(name) + " must be contiguous");
}

void check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + ", but must be at least 1");
}

void bind_common(py::module_& m) {
  py::class_<View>(m, "View", "A strided matrix in memory that Python owns.")
      .def(py::init([](uintptr_t data, const std::string& dtype, int64_t rows, int64_t cols, int64_t row_stride,
                       int64_t col_stride) {
             if (rows < 0 || cols < 0) throw py::value_error("rows and cols must not be negative");
             View view{reinterpret_cast<void*>(data), parse_dtype(dtype), rows, cols, row_stride, col_stride};
             // An empty tensor has no address, yet it was given: any address that is not null says so.
             if (!view.data && rows * cols == 0) view.data = &view_of_nothing;
             if (!view.data) throw py::value_error("data is null");
             return view;
           }),
           py::arg("data"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("row_stride"),
           py::arg("col_stride"));

  m.def("isa", [] { return current_isa().name; }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Isa* isa : supported_isas()) names.emplace_back(isa->name);
        return names;
      },
      "The instruction sets that this build has and this processor runs, best first.");
  m.def("select_isa", &select_isa, py::arg("name"), "Use this instruction set from now on.");
}

}  // namespace kd
