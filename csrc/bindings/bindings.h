// Shared by the binding files: what each registers, and how Python's arguments become views.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "tensor.h"

namespace kd {

namespace py = pybind11;

void bind_common(py::module_& m);
void bind_cuda(py::module_& m);
void bind_hankel(py::module_& m);
void bind_lora_linear(py::module_& m);
void bind_projection_alignment(py::module_& m);
void bind_svd(py::module_& m);

using MaybeView = std::optional<View>;

inline View or_absent(const MaybeView& view) {
  return view.value_or(View{});
}

// Throw ValueError, naming the argument, unless an absent-or-present view has this many rows and columns.
void check_shape(const char* name, const View& view, int64_t rows, int64_t cols);
// Throw unless an absent-or-present view is contiguous, has this many columns, and rows and dtype like another.
void check_batch(const char* name, const View& view, const View& like, int64_t cols);
void check_dtype(const char* name, const View& view, DType dtype);
void check_threads(int threads);

}  // namespace kd
