#include "kdkernels/svd.h"

#include "bindings.h"
#include "isa.h"

namespace kd {

void bind_svd(py::module_& m) {
  m.def(
      "svd",
      [](const Batch& matrices, const Batch& values, const Batch& left, const Batch& right, int threads) {
        check_threads(threads);
        const int64_t rows = matrices.rows, cols = matrices.cols;
        const bool is_complex = matrices.is_complex;
        if (rows < cols) throw py::value_error("rows must be at least cols");
        check_given("values", values.matrices);
        if (bool(left) != bool(right)) throw py::value_error("left and right must both be given, or neither");
        check_batch("matrices", matrices, matrices, rows, cols, is_complex);
        check_batch("values", values, matrices, cols, 1, false);
        check_batch("left", left, matrices, rows, cols, is_complex);
        check_batch("right", right, matrices, cols, cols, is_complex);
        const Svd call{matrices.matrices, values.matrices, left.matrices, right.matrices, rows, cols, is_complex};
        const auto& kernels = *current_isa().svd;
        py::gil_scoped_release release;
        kernels.svd(call, threads);
      },
      py::arg("matrices"), py::arg("values"), py::arg("left"), py::arg("right"), py::arg("threads"));
}

}  // namespace kd
