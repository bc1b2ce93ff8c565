#include "kdkernels/svd.h"

#include "bindings.h"
#include "isa.h"

namespace kd {

void bind_svd(py::module_& m) {
  m.def(
      "svd",
      [](const View& matrices, int64_t rows, int64_t cols, bool is_complex, const View& values, const MaybeView& left,
         const MaybeView& right, int threads) {
        check_threads(threads);
        if (cols < 0 || rows < cols) throw py::value_error("rows must be at least cols, and cols not negative");
        if (bool(left) != bool(right)) throw py::value_error("left and right must both be given, or neither");
        const int64_t parts = is_complex ? 2 : 1;
        const Svd call{matrices, values, or_absent(left), or_absent(right), rows, cols, is_complex};
        check_batch("matrices", call.matrices, matrices, rows * cols * parts);
        check_batch("values", call.values, matrices, cols);
        check_batch("left", call.left, matrices, rows * cols * parts);
        check_batch("right", call.right, matrices, cols * cols * parts);
        const auto& kernels = *current_isa().svd;
        py::gil_scoped_release release;
        kernels.svd(call, threads);
      },
      py::arg("matrices"), py::arg("rows"), py::arg("cols"), py::arg("is_complex"), py::arg("values"), py::arg("left"),
      py::arg("right"), py::arg("threads"));
}

}  // namespace kd
