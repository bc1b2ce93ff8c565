#include "kdkernels/cuda.h"

#include <limits>

#include "bindings.h"

namespace kd {
namespace {

constexpr const char* kWorkspace =
    "Enqueues on the stream. With None for the workspace: returns the bytes that the same call wants of it on the "
    "current device.";

// One row a system: contiguous, aligned to its numbers, `cols` numbers of it.
void* array(const char* name, const View& view, const View& first, int64_t cols, bool is_complex) {
  if (!view) return nullptr;
  const int64_t scalars = cols * (is_complex ? 2 : 1);
  check_shape(name, view, first.rows, scalars);
  check_dtype(name, view, first.dtype);
  if ((view.col_stride != 1 && scalars > 1) || (view.row_stride != scalars && view.rows > 1))
    throw py::value_error(std::string(name) + " must be contiguous");
  const uintptr_t alignment = static_cast<uintptr_t>(size_of(view.dtype) * (is_complex ? 2 : 1));
  if (view.rows * scalars > 0 && reinterpret_cast<uintptr_t>(view.data) % alignment != 0)
    throw py::value_error(std::string(name) + " is not aligned to its numbers");
  return view.data;
}

void check_sizes(const View& first, std::initializer_list<int64_t> matrices) {
  if (first.dtype == DType::bfloat16) throw py::type_error("dtype must be float32 or float64");
  for (int64_t numbers : matrices)
    if (numbers > std::numeric_limits<int>::max() / 2) throw py::value_error("a matrix has 2^30 elements or more");
}

CudaSvd make_svd(const View& matrices, int64_t rows, int64_t cols, bool is_complex) {
  if (cols < 0 || rows < cols) throw py::value_error("rows must be at least cols");
  check_sizes(matrices, {(rows + 1) * cols});
  CudaSvd call{matrices.dtype, is_complex, matrices.rows, rows, cols};
  call.matrices = array("matrices", matrices, matrices, rows * cols, is_complex);
  return call;
}

CudaHankel make_hankel(const View& Lambda, const View& B, const View& C, int64_t n, int64_t m, int64_t p,
                       bool is_complex) {
  if (n < 0 || m < 0 || p < 0) throw py::value_error("n, m and p must not be negative");
  check_sizes(Lambda, {(n + 1) * n, n * m, n * p});
  CudaHankel call{Lambda.dtype, is_complex, Lambda.rows, n, m, p};
  call.Lambda = array("Lambda", Lambda, Lambda, n, is_complex);
  call.B = array("B", B, Lambda, n * m, is_complex);
  call.C = array("C", C, Lambda, p * n, is_complex);
  return call;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def(
      "cuda_svd",
      [](const View& matrices, int64_t rows, int64_t cols, bool is_complex, const View& values, const MaybeView& left,
         const MaybeView& right, std::optional<uintptr_t> workspace, uintptr_t stream) {
        CudaSvd call = make_svd(matrices, rows, cols, is_complex);
        call.values = array("values", values, matrices, cols, false);
        call.left = array("left", or_absent(left), matrices, rows * cols, is_complex);
        call.right = array("right", or_absent(right), matrices, cols * cols, is_complex);
        if (!call.left != !call.right) throw py::value_error("left and right go together");
        py::gil_scoped_release release;
        if (!workspace) return cuda_svd_workspace(call);
        cuda_svd(call, reinterpret_cast<void*>(*workspace), reinterpret_cast<void*>(stream));
        return int64_t{0};
      },
      kWorkspace, py::arg("matrices"), py::arg("rows"), py::arg("cols"), py::arg("is_complex"), py::arg("values"),
      py::arg("left"), py::arg("right"), py::arg("workspace"), py::arg("stream"));

  m.def(
      "cuda_hankel",
      [](const View& Lambda, const View& B, const View& C, int64_t n, int64_t m, int64_t p, bool is_complex,
         const MaybeView& factor_c, const MaybeView& factor_o, const MaybeView& residual_c, const MaybeView& residual_o,
         const MaybeView& values, const MaybeView& T, const MaybeView& W, std::optional<uintptr_t> workspace,
         uintptr_t stream) {
        CudaHankel call = make_hankel(Lambda, B, C, n, m, p, is_complex);
        call.factor_c = array("factor_c", or_absent(factor_c), Lambda, n * n, is_complex);
        call.factor_o = array("factor_o", or_absent(factor_o), Lambda, n * n, is_complex);
        call.residual_c = array("residual_c", or_absent(residual_c), Lambda, n + 1, false);
        call.residual_o = array("residual_o", or_absent(residual_o), Lambda, n + 1, false);
        call.values = array("values", or_absent(values), Lambda, n, false);
        call.T = array("T", or_absent(T), Lambda, n * n, is_complex);
        call.W = array("W", or_absent(W), Lambda, n * n, is_complex);
        if (!call.T != !call.W) throw py::value_error("T and W go together");
        py::gil_scoped_release release;
        if (!workspace) return cuda_hankel_workspace(call);
        cuda_hankel(call, reinterpret_cast<void*>(*workspace), reinterpret_cast<void*>(stream));
        return int64_t{0};
      },
      kWorkspace, py::arg("Lambda"), py::arg("B"), py::arg("C"), py::arg("n"), py::arg("m"), py::arg("p"),
      py::arg("is_complex"), py::arg("factor_c"), py::arg("factor_o"), py::arg("residual_c"), py::arg("residual_o"),
      py::arg("values"), py::arg("T"), py::arg("W"), py::arg("workspace"), py::arg("stream"));
}

}  // namespace kd
