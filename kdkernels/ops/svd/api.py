"""`svd` and `svdvals`: the documented functions, their checks and their choice of implementation."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import Contract
from kdkernels.ops.svd import native, reference, schema
from kdkernels.plans import Plans

CONTRACT = Contract(backends.REAL_OR_COMPLEX, A="... rows cols")
PLANS = Plans()


class SVD(NamedTuple):
    """A = U diag(S) Vh."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def svd(A: Tensor, full_matrices: bool = True, *, driver: str | None = None, backend: str = "auto") -> SVD:
    """The singular value decomposition A = U diag(S) Vᴴ of a batch of small matrices, called as `torch.linalg.svd`.

    On the CPU by one-sided Jacobi (Demmel and Veselić 1992; Drmač and Veselić 2008) with the batch across SIMD lanes,
    which also gets the small singular values right of a matrix whose columns (of a wide one: rows) differ by many
    orders of magnitude, up to 70 decades in float32 and 600 in float64; above 72 (complex128) to 120 columns (float32)
    by `torch.linalg`, in parallel over the batch.

    Args:
        A: (..., rows, cols), real or complex, float32 or float64.
        full_matrices: whether U and Vh are square. With k = min(rows, cols), what is beyond the first k columns of U or
            rows of Vh is some orthonormal basis of the rest, by a QR decomposition; `False` saves it.
        driver: on CUDA, the routine of cuSOLVER that `torch.linalg.svd` shall use instead; elsewhere that is an error.
        backend: `"auto"`, `"reference"` or `"native"`. One that was asked for by name and cannot serve raises.

    Returns:
        U (..., rows, rows), S (..., k) real and descending, Vh (..., cols, cols); without `full_matrices`
        U (..., rows, k) and Vh (..., k, cols). A matrix with a NaN or an infinity gives NaN; the others of the batch
        are right.

    Gradients: of functions that do not depend on the free choice of the vectors: of signs (phases, if complex) and,
    where singular values are equal, of bases. What is beyond k has none. Two values count as equal where they differ by
    at most √ε of their sum. Where some do, the gradient is finite, and right for a function

    - of S alone, symmetric in the equal values (norms, log-determinants),
    - of the spaces that belong to all equal values together (projectors, the polar factor U Vh),
    - of U diag(g(S)) Vh, U diag(g(S)) Uᴴ or the same of V, with one smooth g, such as A itself or its leading part,

    and for one of the first kind plus one of the others. The outputs' gradients do not determine more: g′/g is the
    slope of ∂S over the diagonal of Uᴴ ∂U and V ∂Vᴴ (their mean). If all of that diagonal is equal, the function is
    taken to have no part of S alone; if it is 0, g(S) is taken to be S. For sums with several g, or of a projector and
    such a function, the part between equal values is wrong; single vectors of equal values have no gradient, and what
    comes out for them means nothing.

    What cannot be told at values of exactly 0 comes out as 0: of U diag(S) Vh all between two such values but the
    diagonal; of one such value the imaginary part and, if A is not square, what lies outside the k columns of U or V.
    Second derivatives through the vectors need values that are not equal. torch.func, torch.jit.trace and forward mode
    have torch's own derivatives, without this rule.

    Raises:
        TypeError: A is no tensor of one of these dtypes, or full_matrices no bool.
        ValueError: A has fewer than two dimensions, or the backend cannot serve.
        RuntimeError: torch's, of a driver that it does not have here.
    """
    plan = _prepare("svd", A, backend, driver)
    if not isinstance(full_matrices, bool):
        raise TypeError(f"full_matrices is {type(full_matrices).__name__}, but must be a bool")
    if plan.backend.backend == "reference":
        U, S, Vh = reference.svd(A, driver)
    elif plan.leading is None:
        U, S, Vh = plan.run(A)
    else:
        U, S, Vh = (x.reshape(*plan.leading, *x.shape[1:]) for x in plan.run(_flat(A, plan)))
    if full_matrices and A.shape[-2] != A.shape[-1]:
        U, Vh = complete(U), complete(Vh.mH).mH.resolve_conj()
    return SVD(U, S, Vh)


def complete(basis: Tensor) -> Tensor:
    """Orthonormal columns (..., n, k) and n − k more, which have no gradient: (..., n, n)."""
    n, k = basis.shape[-2:]
    if n == k:
        return basis
    Q = torch.linalg.qr(basis.detach(), mode="complete").Q
    return torch.cat([basis, Q[..., k:]], -1)


def svdvals(A: Tensor, *, driver: str | None = None, backend: str = "auto") -> Tensor:
    """The singular values of a batch of small matrices, descending: (..., rows, cols) -> (..., min(rows, cols)).

    Called as `torch.linalg.svdvals`; arguments, errors and NaN as in `svd`. The gradient is U diag(∂S) Vᴴ: at repeated
    values it is right for symmetric functions, such as sums, and so is the second derivative, by the rule of `svd`.
    (The reference has torch's second derivative: NaN or infinite there.)
    """
    plan = _prepare("svdvals", A, backend, driver)
    if plan.backend.backend == "reference":
        return reference.svdvals(A, driver)
    S = plan.run(A if plan.leading is None else _flat(A, plan))
    S = S[1] if isinstance(S, tuple) else S
    return S if plan.leading is None else S.reshape(*plan.leading, S.shape[-1])


class _Plan(NamedTuple):
    """What is decided of a call."""

    backend: backends.Implementation
    run: Callable[[Tensor], Any]  # of the operator, in the way that such a tensor needs; where it has a gradient, svd's
    leading: tuple[int, ...] | None  # unless there is one leading dimension


def _prepare(op: str, A: Tensor, backend: str, driver: str | None) -> _Plan:
    def decide() -> _Plan:
        CONTRACT.bind({"A": A})
        wanted = "reference" if driver is not None and backend == "auto" else backend
        chosen = backends.choose(op, wanted, A.device.type, (A.dtype,))
        if chosen.backend != "reference":
            if driver is not None:
                raise ValueError(f"driver is {driver!r}, which is torch's: backend must be 'auto' or 'reference'")
            backends.refuse_tangents(op, (A,))
        vectors = op == "svd" or (torch.is_grad_enabled() and A.requires_grad)
        operator = schema.svd if vectors else schema.svdvals
        return _Plan(chosen, operator.route((A,)), None if A.dim() == 3 else A.shape[:-2])

    return PLANS.find((A,), (op, backend, driver, backends.default(), torch.is_grad_enabled()), decide)


def _flat(A: Tensor, plan: _Plan) -> Tensor:
    return A.reshape(prod(plan.leading or ()), *A.shape[-2:])


def jacobi_flops(rows: int, cols: int, vectors: bool) -> int:
    """Of one real matrix: QR, and about four sweeps.

    In a sweep all pairs of columns meet in an inner product and a rotation, which turns vectors along.
    """
    return 2 * rows * cols**2 + 4 * (3 + 2 * vectors) * cols**3


def _explain(op: str, A: Tensor, backend: str, driver: str | None, full_matrices: bool = False) -> backends.Explanation:
    chosen = _prepare(op, A, backend, driver).backend
    rows, cols = max(A.shape[-2:]), min(A.shape[-2:])
    N, size = prod(A.shape[:-2]), A.element_size()
    vectors = op == "svd"
    real = 4 if A.is_complex() else 1
    moved = N * size * (rows * cols + cols + vectors * (rows + cols) * cols)
    rest = (rows - cols) * full_matrices  # columns that a QR decomposition adds
    moved += N * size * rows * rest
    completion = real * N * 4 * rows * cols * rest
    jacobi = completion + real * N * jacobi_flops(rows, cols, vectors)
    lapack = completion + real * N * (
        (4 * rows * cols**2 + 22 * cols**3) if vectors else (2 * rows * cols**2 + 2 * cols**3)
    )
    most = native.CROSSOVER[A.dtype]
    above = f"it serves up to {most} columns" if cols > most else None
    method = "jacobi" if chosen.backend == "native" and above is None else "lapack"
    costs = (backends.Cost("jacobi", jacobi, moved, above), backends.Cost("lapack", lapack, moved))
    reasons = backends.passed_over(op, chosen, A.device.type, (A.dtype,))
    return backends.Explanation(op, chosen.backend, method, reasons, costs)


backends.register_explainer(svd, partial(_explain, "svd"))
backends.register_explainer(svdvals, partial(_explain, "svdvals"))
