#include "kdkernels/cuda.h"

#include <limits>
#include <optional>

#include "bindings.h"

namespace kd {
namespace {

constexpr const char* kWorkspace =
    "Enqueues on the stream. With None for the workspace: returns the bytes that the same call wants of it on the "
    "current device.";

void* array(const char* name, const Batch& batch, const Batch& like, int64_t rows, int64_t cols, bool is_complex) {
  if (!batch) return nullptr;
  check_batch(name, batch, like, rows, cols, is_complex);
  const View& view = batch.matrices;
  const uintptr_t alignment = static_cast<uintptr_t>(size_of(view.dtype) * (is_complex ? 2 : 1));
  if (view.rows * view.cols > 0 && reinterpret_cast<uintptr_t>(view.data) % alignment != 0)
    throw py::value_error(std::string(name) + " is not aligned to its numbers");
  return view.data;
}

void check_sizes(std::initializer_list<int64_t> matrices) {
  for (int64_t numbers : matrices)
    if (numbers > std::numeric_limits<int>::max() / 2) throw py::value_error("a matrix has 2^30 elements or more");
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def(
      "cuda_svd",
      [](const Batch& matrices, const Batch& values, const Batch& left, const Batch& right,
         std::optional<uintptr_t> workspace, uintptr_t stream) {
        const int64_t rows = matrices.rows, cols = matrices.cols;
        const bool is_complex = matrices.is_complex;
        if (rows < cols) throw py::value_error("rows must be at least cols");
        check_sizes({(rows + 1) * cols});
        CudaSvd call{matrices.matrices.dtype, is_complex, matrices.matrices.rows, rows, cols};
        call.matrices = array("matrices", matrices, matrices, rows, cols, is_complex);
        call.values = array("values", values, matrices, cols, 1, false);
        call.left = array("left", left, matrices, rows, cols, is_complex);
        call.right = array("right", right, matrices, cols, cols, is_complex);
        if (!call.left != !call.right) throw py::value_error("left and right go together");
        py::gil_scoped_release release;
        if (!workspace) return cuda_svd_workspace(call);
        cuda_svd(call, reinterpret_cast<void*>(*workspace), reinterpret_cast<void*>(stream));
        return int64_t{0};
      },
      kWorkspace, py::arg("matrices"), py::arg("values"), py::arg("left"), py::arg("right"), py::arg("workspace"),
      py::arg("stream"));

  m.def(
      "cuda_hankel",
      [](const Batch& Lambda, const Batch& B, const Batch& C, const Batch& factor_c, const Batch& factor_o,
         const Batch& residual_c, const Batch& residual_o, const Batch& values, const Batch& T, const Batch& W,
         std::optional<uintptr_t> workspace, uintptr_t stream) {
        const int64_t n = Lambda.rows, m = B.cols, p = C.rows;
        const bool is_complex = Lambda.is_complex;
        check_sizes({(n + 1) * n, n * m, n * p});
        CudaHankel call{Lambda.matrices.dtype, is_complex, Lambda.matrices.rows, n, m, p};
        call.Lambda = array("Lambda", Lambda, Lambda, n, 1, is_complex);
        call.B = array("B", B, Lambda, n, m, is_complex);
        call.C = array("C", C, Lambda, p, n, is_complex);
        call.factor_c = array("factor_c", factor_c, Lambda, n, n, is_complex);
        call.factor_o = array("factor_o", factor_o, Lambda, n, n, is_complex);
        call.residual_c = array("residual_c", residual_c, Lambda, n + 1, 1, false);
        call.residual_o = array("residual_o", residual_o, Lambda, n + 1, 1, false);
        call.values = array("values", values, Lambda, n, 1, false);
        call.T = array("T", T, Lambda, n, n, is_complex);
        call.W = array("W", W, Lambda, n, n, is_complex);
        if (!call.T != !call.W) throw py::value_error("T and W go together");
        py::gil_scoped_release release;
        if (!workspace) return cuda_hankel_workspace(call);
        cuda_hankel(call, reinterpret_cast<void*>(*workspace), reinterpret_cast<void*>(stream));
        return int64_t{0};
      },
      kWorkspace, py::arg("Lambda"), py::arg("B"), py::arg("C"), py::arg("factor_c"), py::arg("factor_o"),
      py::arg("residual_c"), py::arg("residual_o"), py::arg("values"), py::arg("T"), py::arg("W"), py::arg("workspace"),
      py::arg("stream"));
}

}  // namespace kd
