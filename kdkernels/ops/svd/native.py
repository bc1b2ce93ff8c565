"""Small matrices in C++, each in a SIMD lane on the CPU, each in a few warps on a GPU; larger ones by torch.linalg.

The kernels are in csrc/cpu/svd.cpp and csrc/cuda/svd.cu, their formulas in csrc/include/kdkernels/svd.h.
"""

import torch
from torch import Tensor

from kdkernels import _native
from kdkernels.contract import resolved
from kdkernels.ops.svd import lapack

# The largest number of columns that Jacobi serves, as measured on batches of 64. It is not a function of the batch: a
# matrix has the same result alone.
CROSSOVER = {torch.float32: 120, torch.float64: 88, torch.complex64: 88, torch.complex128: 72}


def svd(matrix: Tensor, *, vectors: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(N, rows, cols) -> U, S, Vh, contiguous; U and Vh are None without `vectors`."""
    _, rows, cols = matrix.shape
    matrix, wide = resolved(matrix), rows < cols
    tall = adjoint(matrix) if wide else matrix
    rows, cols = max(rows, cols), min(rows, cols)
    if cols > CROSSOVER[matrix.dtype]:
        if not vectors:
            return None, lapack.svdvals(tall), None
        U, S, Vh = lapack.svd(matrix)
        return U.contiguous(), S, Vh.contiguous()
    if matrix.is_cuda:
        left, values, right = _on_a_gpu(tall.contiguous(), vectors)
        right = right if right is None or wide else adjoint(right)
    else:
        left, values, right = _native.module().svd(tall.contiguous(), vectors, not wide, torch.get_num_threads())
    if not vectors:
        return None, values, None
    assert left is not None
    return (right, values, adjoint(left)) if wide else (left, values, right)


def _on_a_gpu(tall: Tensor, vectors: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """U, S and V."""
    N, rows, cols = tall.shape
    values = tall.new_empty(N, cols, dtype=tall.dtype.to_real())
    left, right = (tall.new_empty(N, n, cols) if vectors else None for n in (rows, cols))
    if N and cols:
        _native.launch("cuda_svd", tall.device, tall, values, left, right)
    return left, values, right


def adjoint(x: Tensor) -> Tensor:
    """Xᴴ as it lies in memory."""
    x = resolved(x).mT
    return x.conj_physical().contiguous() if x.is_complex() else x.contiguous()
