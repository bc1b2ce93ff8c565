#include "kdkernels/svd.h"

#include "bindings.h"
#include "isa.h"

namespace kd {

void bind_svd(py::module_& m) {
  m.def(
      "svd",
      [](const py::object& matrices, bool vectors, bool right_adjoint, int threads) {
        check_threads(threads);
        const Batch A = batch_of(matrices);
        check_given("matrices", A.matrices);
        if (A.rows < A.cols) throw py::value_error("rows must be at least cols");
        check_batch("matrices", A, A, A.rows, A.cols, A.is_complex);
        const int64_t N = A.matrices.rows;
        const char* real = !A.is_complex ? nullptr : A.matrices.dtype == DType::float64 ? "float64" : "float32";
        py::object values = new_tensor(matrices, {N, A.cols}, real), left = py::none(), right = py::none();
        if (vectors) {
          left = new_tensor(matrices, {N, A.rows, A.cols});
          right = new_tensor(matrices, {N, A.cols, A.cols});
        }
        const Svd call{A.matrices,
                       batch_of(values).matrices,
                       batch_of(left).matrices,
                       batch_of(right).matrices,
                       A.rows,
                       A.cols,
                       A.is_complex,
                       right_adjoint};
        {
          const auto& kernels = *current_isa().svd;
          py::gil_scoped_release release;
          kernels.svd(call, threads);
        }
        return py::make_tuple(left, values, right);
      },
      "U, Σ and V, or its adjoint; without `vectors` Σ alone.", py::arg("matrices"), py::arg("vectors"),
      py::arg("right_adjoint"), py::arg("threads"));
}

}  // namespace kd
