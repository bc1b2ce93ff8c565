#include "kdkernels/hankel.h"

#include "bindings.h"
#include "isa.h"

namespace kd {

void bind_hankel(py::module_& m) {
  m.def(
      "hankel",
      [](const View& Lambda, const View& B, const View& C, int64_t n, int64_t m, int64_t p, bool is_complex,
         const MaybeView& factor_c, const MaybeView& factor_o, const MaybeView& residual_c, const MaybeView& residual_o,
         const MaybeView& values, const MaybeView& T, const MaybeView& W, int threads) {
        check_threads(threads);
        if (n < 0 || m < 0 || p < 0) throw py::value_error("n, m and p must not be negative");
        const int64_t parts = is_complex ? 2 : 1;
        const Hankel call{Lambda,
                          B,
                          C,
                          or_absent(factor_c),
                          or_absent(factor_o),
                          or_absent(residual_c),
                          or_absent(residual_o),
                          or_absent(values),
                          or_absent(T),
                          or_absent(W),
                          n,
                          m,
                          p,
                          is_complex};
        check_batch("Lambda", call.Lambda, Lambda, n * parts);
        check_batch("B", call.B, Lambda, n * m * parts);
        check_batch("C", call.C, Lambda, p * n * parts);
        check_batch("factor_c", call.factor_c, Lambda, n * n * parts);
        check_batch("factor_o", call.factor_o, Lambda, n * n * parts);
        check_batch("residual_c", call.residual_c, Lambda, n + 1);
        check_batch("residual_o", call.residual_o, Lambda, n + 1);
        check_batch("values", call.values, Lambda, n);
        check_batch("T", call.T, Lambda, n * n * parts);
        check_batch("W", call.W, Lambda, n * n * parts);
        const auto& kernels = *current_isa().hankel;
        py::gil_scoped_release release;
        kernels.hankel(call, threads);
      },
      py::arg("Lambda"), py::arg("B"), py::arg("C"), py::arg("n"), py::arg("m"), py::arg("p"), py::arg("is_complex"),
      py::arg("factor_c"), py::arg("factor_o"), py::arg("residual_c"), py::arg("residual_o"), py::arg("values"),
      py::arg("T"), py::arg("W"), py::arg("threads"));
}

}  // namespace kd
