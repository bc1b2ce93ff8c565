"""`svd` and `svdvals`: the documented functions, their checks and their choice of implementation."""

from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import Contract
from kdkernels.ops.svd import native, reference, schema

CONTRACT = Contract(backends.REAL_OR_COMPLEX, matrix="... rows cols")


class SVD(NamedTuple):
    """A = U diag(S) Vh."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def svd(matrix: Tensor, *, backend: str = "auto") -> SVD:
    """The reduced singular value decomposition A = U diag(S) Vᴴ of a batch of small matrices.

    On the CPU by one-sided Jacobi (Demmel and Veselić 1992; Drmač and Veselić 2008) with the batch across SIMD lanes,
    which also gets the small singular values right of a matrix whose columns (of a wide one: rows) differ by many
    orders of magnitude, up to 70 decades in float32 and 600 in float64; above 72 (complex128) to 120 columns (float32)
    by `torch.linalg`, in parallel over the batch.

    Args:
        matrix: (..., rows, cols), real or complex, float32 or float64.
        backend: `"auto"`, `"reference"` or `"native"`. One that was asked for by name and cannot serve raises.

    Returns:
        U (..., rows, k), S (..., k) real and descending, Vh (..., k, cols), with k = min(rows, cols). A matrix with a
        NaN or an infinity gives NaN; the others of the batch are right.

    Gradients: of functions that do not depend on the free signs (phases, if complex) of the vectors. Where singular
    values are equal the single vectors are not determined and functions of them have no gradient: it is infinite or NaN
    there, as in torch, and large near there. Functions of S alone, such as a sum, have one everywhere. The gradient of
    the part of U or V that belongs to a singular value of 0 does not exist either.

    Raises:
        TypeError: matrix is no tensor of one of these dtypes.
        ValueError: it has fewer than two dimensions, or the backend cannot serve.
    """
    chosen = _prepare("svd", matrix, backend)
    if chosen.backend == "reference":
        return SVD(*reference.svd(matrix))
    leading, (rows, cols) = matrix.shape[:-2], matrix.shape[-2:]
    found = schema.svd(matrix.reshape(prod(leading), rows, cols))
    return SVD(*(x.reshape(*leading, *x.shape[1:]) for x in found))


def svdvals(matrix: Tensor, *, backend: str = "auto") -> Tensor:
    """The singular values of a batch of small matrices, descending: (..., rows, cols) -> (..., min(rows, cols)).

    Arguments, errors and NaN as in `svd`. The gradient is U diag(∂S) Vᴴ: at repeated values it is right for symmetric
    functions, such as sums. A second derivative exists where no two values are equal; it is NaN or infinite elsewhere.
    """
    chosen = _prepare("svdvals", matrix, backend)
    if chosen.backend == "reference":
        return reference.svdvals(matrix)
    leading, (rows, cols) = matrix.shape[:-2], matrix.shape[-2:]
    batch = matrix.reshape(prod(leading), rows, cols)
    differentiable = torch.is_grad_enabled() and matrix.requires_grad
    S = schema.svd(batch)[1] if differentiable else schema.svdvals(batch)
    return S.reshape(*leading, S.shape[-1])


def _prepare(op: str, matrix: Tensor, backend: str) -> backends.Implementation:
    CONTRACT.bind({"matrix": matrix})
    chosen = backends.choose(op, backend, matrix.device.type, (matrix.dtype,))
    if chosen.backend != "reference":
        backends.refuse_tangents(op, (matrix,))
    return chosen


def jacobi_flops(rows: int, cols: int, vectors: bool) -> int:
    """Of one real matrix: QR, and about four sweeps.

    In a sweep all pairs of columns meet in an inner product and a rotation, which turns vectors along.
    """
    return 2 * rows * cols**2 + 4 * (3 + 2 * vectors) * cols**3


def _explain(op: str, matrix: Tensor, backend: str) -> backends.Explanation:
    chosen = _prepare(op, matrix, backend)
    rows, cols = max(matrix.shape[-2:]), min(matrix.shape[-2:])
    N, size = prod(matrix.shape[:-2]), matrix.element_size()
    vectors = op == "svd"
    real = 4 if matrix.is_complex() else 1
    moved = N * size * (rows * cols + cols + vectors * (rows + cols) * cols)
    jacobi = real * N * jacobi_flops(rows, cols, vectors)
    lapack = real * N * ((4 * rows * cols**2 + 22 * cols**3) if vectors else (2 * rows * cols**2 + 2 * cols**3))
    most = native.CROSSOVER[matrix.dtype]
    above = f"it serves up to {most} columns" if cols > most else None
    method = "jacobi" if chosen.backend == "native" and above is None else "lapack"
    costs = (backends.Cost("jacobi", jacobi, moved, above), backends.Cost("lapack", lapack, moved))
    reasons = backends.passed_over(op, chosen, matrix.device.type, (matrix.dtype,))
    return backends.Explanation(op, chosen.backend, method, reasons, costs)


backends.register_explainer(svd, partial(_explain, "svd"))
backends.register_explainer(svdvals, partial(_explain, "svdvals"))
