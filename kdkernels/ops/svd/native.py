"""Small matrices in C++, each in a SIMD lane on the CPU, each in a few warps on a GPU; larger ones by torch.linalg.

The kernels are in csrc/cpu/svd.cpp and csrc/cuda/svd.cu, their formulas in csrc/include/kdkernels/svd.h.
"""

import torch
from torch import Tensor

from kdkernels import _native
from kdkernels.ops.svd import lapack

# The largest number of columns that Jacobi serves, as measured on batches of 64. It is not a function of the batch: a
# matrix has the same result alone.
CROSSOVER = {torch.float32: 120, torch.float64: 88, torch.complex64: 88, torch.complex128: 72}


def svd(matrix: Tensor, *, vectors: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(N, rows, cols) -> U, S, Vh, contiguous; U and Vh are None without `vectors`."""
    N, rows, cols = matrix.shape
    wide = rows < cols
    tall = adjoint(matrix) if wide else matrix.resolve_conj().resolve_neg()
    rows, cols = max(rows, cols), min(rows, cols)
    if cols > CROSSOVER[matrix.dtype]:
        if not vectors:
            return None, lapack.svdvals(tall), None
        U, S, Vh = lapack.svd(matrix.resolve_conj().resolve_neg())
        return U.contiguous(), S, Vh.contiguous()
    values = matrix.new_empty(N, cols, dtype=matrix.dtype.to_real())
    left = matrix.new_empty(N, rows, cols) if vectors else None
    right = matrix.new_empty(N, cols, cols) if vectors else None
    if N and cols:
        arguments = (tall.contiguous(), values, left, right)
        if matrix.is_cuda:
            _native.launch("cuda_svd", matrix.device, *arguments)
        else:
            _native.module().svd(*arguments, torch.get_num_threads())
    if left is None or right is None:
        return None, values, None
    if wide:
        return right, values, adjoint(left)
    return left, values, adjoint(right)


def adjoint(x: Tensor) -> Tensor:
    """Xᴴ as it lies in memory."""
    if not x.is_complex():
        return x.resolve_neg().mT.contiguous()
    return x.resolve_conj().resolve_neg().mT.conj_physical().contiguous()
