#include "kdkernels/hankel.h"

#include "bindings.h"
#include "isa.h"

namespace kd {

void bind_hankel(py::module_& m) {
  m.def(
      "hankel",
      [](const Batch& Lambda, const Batch& B, const Batch& C, const Batch& factor_c, const Batch& factor_o,
         const Batch& residual_c, const Batch& residual_o, const Batch& values, const Batch& T, const Batch& W,
         int threads) {
        check_threads(threads);
        for (const Batch* given : {&Lambda, &B, &C}) check_given("a system", given->matrices);
        const int64_t n = Lambda.rows, m = B.cols, p = C.rows;
        const bool is_complex = Lambda.is_complex;
        check_batch("Lambda", Lambda, Lambda, n, 1, is_complex);
        check_batch("B", B, Lambda, n, m, is_complex);
        check_batch("C", C, Lambda, p, n, is_complex);
        check_batch("factor_c", factor_c, Lambda, n, n, is_complex);
        check_batch("factor_o", factor_o, Lambda, n, n, is_complex);
        check_batch("residual_c", residual_c, Lambda, n + 1, 1, false);
        check_batch("residual_o", residual_o, Lambda, n + 1, 1, false);
        check_batch("values", values, Lambda, n, 1, false);
        check_batch("T", T, Lambda, n, n, is_complex);
        check_batch("W", W, Lambda, n, n, is_complex);
        const Hankel call{Lambda.matrices,
                          B.matrices,
                          C.matrices,
                          factor_c.matrices,
                          factor_o.matrices,
                          residual_c.matrices,
                          residual_o.matrices,
                          values.matrices,
                          T.matrices,
                          W.matrices,
                          n,
                          m,
                          p,
                          is_complex};
        const auto& kernels = *current_isa().hankel;
        py::gil_scoped_release release;
        kernels.hankel(call, threads);
      },
      py::arg("Lambda"), py::arg("B"), py::arg("C"), py::arg("factor_c"), py::arg("factor_o"), py::arg("residual_c"),
      py::arg("residual_o"), py::arg("values"), py::arg("T"), py::arg("W"), py::arg("threads"));
}

}  // namespace kd
