// Shared by the binding files: what each registers, and how Python's arguments become views.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>

#include "tensor.h"

namespace kd {

namespace py = pybind11;

void bind_common(py::module_& m);
void bind_cuda(py::module_& m);
void bind_hankel(py::module_& m);
void bind_linear_distillation(py::module_& m);
void bind_linear_recurrence(py::module_& m);
void bind_lora_linear(py::module_& m);
void bind_lru_block(py::module_& m);
void bind_projection_alignment(py::module_& m);
void bind_svd(py::module_& m);

// Batches of matrices, contiguous: a row of `matrices` holds the numbers of one, a complex one as two.
struct Batch {
  View matrices;
  int64_t rows = 0, cols = 0;  // of each; of a batch of vectors cols is 1
  bool is_complex = false;

  explicit operator bool() const { return bool(matrices); }
};

// A torch.Tensor of at most two dimensions, and one of at least one; None is absent. They hold no reference.
View view_of(py::handle tensor);
Batch batch_of(py::handle tensor);

// A tensor as it lies in memory, held while it is used: torch keeps some signs, and some zeros, elsewhere.
struct Held {
  py::object tensor;
  View view;
};
Held hold(py::handle tensor);

// A new tensor of another's kind, of its dtype or the one named.
py::object new_tensor(py::handle like, std::initializer_list<int64_t> sizes, const char* dtype = nullptr);

// Throw ValueError, naming the argument, unless an absent-or-present view has this many rows and columns.
void check_shape(const char* name, const View& view, int64_t rows, int64_t cols);
// Throw unless an absent-or-present batch has matrices of this size, as many as another, of its dtype and complex or
// not.
void check_batch(const char* name, const Batch& batch, const Batch& like, int64_t rows, int64_t cols, bool is_complex);
// Throw ValueError unless the view is there.
void check_given(const char* name, const View& view);
void check_dtype(const char* name, const View& view, DType dtype);
void check_threads(int threads);

}  // namespace kd

namespace pybind11::detail {

template <>
struct type_caster<kd::View> {
  PYBIND11_TYPE_CASTER(kd::View, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = kd::view_of(source);
    return true;
  }
};

template <>
struct type_caster<kd::Batch> {
  PYBIND11_TYPE_CASTER(kd::Batch, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = kd::batch_of(source);
    return true;
  }
};

}  // namespace pybind11::detail
