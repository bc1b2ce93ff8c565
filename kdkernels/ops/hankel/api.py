"""`gramian_factors`, `hankel_singular_values` and `hankel_energy`: checks and the choice of implementation."""

from math import isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import check_count, check_number
from kdkernels.library import watched
from kdkernels.ops.hankel import reference, schema
from kdkernels.ops.hankel.systems import Operand, Systems, check

MOST_STEPS = 2**63 - 1  # what an operator's int holds


class GramianFactors(NamedTuple):
    """P = L_c L_cᴴ and Q = L_o L_oᴴ, column k that of the k-th pivot, and how much of each trace is left after k."""

    controllability: Tensor  # L_c (..., n, n)
    observability: Tensor  # L_o (..., n, n)
    controllability_residual: Tensor  # (..., n + 1): trace(P) − ‖first k columns‖²
    observability_residual: Tensor  # (..., n + 1)

    def ranks(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """How many columns leave at most `tolerance` of each trace: two of (...), int64.

        The residuals are sums of pivots, all at least 0, so the ranks are certified, not estimated. They are n where
        the trace itself leaves the dtype's range, and of a system that is not finite.

        Raises:
            TypeError, ValueError: tolerance is no number of at least 0.
        """
        check_number("tolerance", tolerance)
        residuals = (self.controllability_residual, self.observability_residual)
        left = (r[..., :-1] > float(tolerance) * r[..., :1] for r in residuals)
        beyond = (~r[..., :1].isfinite() for r in residuals)
        return tuple((x | y).sum(-1) for x, y in zip(left, beyond, strict=True))  # type: ignore[return-value]


def gramian_factors(Lambda: Operand, B: Operand, C: Operand, *, backend: str = "auto") -> Any:
    """Factors of the Gramians of h⁺ = Λh + Bu, y = Ch, without forming the Gramians.

    A pivoted Cholesky factorisation of the generator: with |λ| near 1, equal or crowded λ, and Gramians whose
    eigenvalues span more decades than the dtype has digits, it neither fails nor needs jitter, and the trace that the
    first k columns leave unexplained is known exactly.

    Args:
        Lambda: (..., n), real or complex, float32 or float64, |λ| < 1.
        B: (..., n, m).
        C: (..., p, n). Leading dimensions broadcast, dtypes are promoted to a common one. Or each a list of such
            tensors, systems of different sizes.
        backend: `"auto"`, `"reference"` or `"native"`. One that was asked for by name and cannot serve raises.

    Returns:
        `GramianFactors`, for lists a list of them. Differentiable on the reference only. In float32, rows of B and
        columns of C below about 1e-19 of the largest count as 0 there, as their squares leave the range.

    A system with a NaN or an infinity gives NaN, and the others are right.

    Raises:
        TypeError: an argument is no tensor of these dtypes; in a list the message says which.
        ValueError: shapes or devices do not fit, or some |λ| ≥ 1. (On CUDA and in compiled code |λ| ≥ 1 gives NaN: to
            raise would need the device to be waited for.)
    """
    systems = check(Lambda, B, C)
    chosen = choose("gramian_factors", backend, systems)

    def compute(Lambda: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
        if chosen.backend == "reference":
            return reference.gramian_factors(Lambda, B, C)
        return schema.gramian_factors(Lambda, B, C)

    found = systems.each(compute, (_square, _square, _residual, _residual))
    results = found if systems.is_list else [found]
    _refuse_unstable(systems, [result[2] for result in results])  # which is NaN where the other residual is
    named = [GramianFactors(*result) for result in results]
    return named if systems.is_list else named[0]


def hankel_singular_values(
    Lambda: Operand,
    B: Operand,
    C: Operand,
    *,
    horizon: int | None = None,
    real_output: bool = False,
    backend: str = "auto",
) -> Any:
    """The Hankel singular values σ = sqrt(eig(PQ)) of h⁺ = Λh + Bu, y = Ch, descending.

    P and Q are its Gramians. They are not formed: σ are the singular values of L_oᴴ L_c, with the factors of
    `gramian_factors`. Up to about a hundred states native gets every σ right in float32, the smallest too, where
    eig(PQ) has half the digits and returns NaN; above, and on the reference, those above 1e-13 of the largest.

    Args:
        Lambda: (..., n), real or complex, float32 or float64.
        B: (..., n, m).
        C: (..., p, n). Leading dimensions broadcast, dtypes are promoted to a common one. Or each a list of such
            tensors, systems of different sizes, which run together.
        horizon: count L steps only: P = Σ_{k<L} Λ^k BBᴴ Λ*^k, Q likewise. None: all of them, for which |λ| < 1.
            With a horizon any λ is served; then a σ is right to about 1e-13 of the largest, and NaN where λ^L leaves
            float64's range.
        real_output: the output is Re(Ch): the values of the real system of order 2n, (Λ, B, C/2) beside its conjugate.
        backend: `"auto"`, `"reference"` or `"native"`. One that was asked for by name and cannot serve raises.

    Returns:
        (..., n), or (..., 2n) for `real_output`, real; for lists a list of them. A system with a NaN or an infinity
        gives NaN, and the others are right.

    Gradients are computed in float64 by a closed form without 1/(σ_i² − σ_j²): right at repeated values for symmetric
    functions, such as Σσ; a σ of 0 contributes nothing. Native is differentiable once, the reference any way (once,
    with a horizon).

    The squares of B and C must stay in float64's range for gradients, and on the reference for values too.

    Raises:
        TypeError: an argument is no tensor of these dtypes; in a list the message says which.
        ValueError: shapes, devices or options do not fit, or some |λ| ≥ 1 without a horizon. (On CUDA and in compiled
            code |λ| ≥ 1 gives NaN: to raise would need the device to be waited for.)
    """
    systems, horizon = arguments(Lambda, B, C, horizon, real_output)
    chosen = choose("hankel_singular_values", backend, systems)

    def compute(Lambda: Tensor, B: Tensor, C: Tensor) -> Tensor:
        if chosen.backend == "reference":
            return reference.hankel_singular_values(Lambda, B, C, horizon)
        vectors = torch.is_grad_enabled() and any(x.requires_grad for x in (Lambda, B, C))
        return schema.hankel_singular_values(Lambda, B, C, horizon or 0, vectors)[0]

    sigma = systems.each(compute, (lambda x, n: x[..., :n],))
    if horizon is None:
        _refuse_unstable(systems, sigma if systems.is_list else [sigma])
    return sigma


def hankel_energy(
    Lambda: Operand,
    B: Operand,
    C: Operand,
    *,
    horizon: int | None = None,
    real_output: bool = False,
    backend: str = "auto",
) -> Any:
    """Σσ² = tr(PQ), the sum of the squared Hankel singular values, without a decomposition.

    Costs O(n²(m + p)) and is differentiable any way. Arguments and errors as in `hankel_singular_values`.

    Returns:
        (...), real; for lists a list of them.
    """
    systems, horizon = arguments(Lambda, B, C, horizon, real_output)
    choose("hankel_energy", backend, systems)
    energy = systems.each(lambda Lambda, B, C: reference.hankel_energy(Lambda, B, C, horizon))
    if horizon is None:
        _refuse_unstable(systems, energy if systems.is_list else [energy])
    return energy


def arguments(
    Lambda: Operand, B: Operand, C: Operand, horizon: int | None, real_output: bool
) -> tuple[Systems, int | None]:
    """The checked systems and horizon."""
    if horizon is not None:
        check_count("horizon", horizon)
        if horizon > MOST_STEPS:
            raise ValueError(f"horizon is {horizon}, but must be at most 2**63 - 1")
    if not isinstance(real_output, bool):
        raise TypeError(f"real_output is {type(real_output).__name__}, but must be a bool")
    systems = check(Lambda, B, C)
    if real_output:
        systems = Systems([member.doubled() for member in systems.members], systems.is_list)
    return systems, None if horizon is None else int(horizon)


def _square(x: Tensor, n: int) -> Tensor:
    return x[..., :n, :n]


def _residual(x: Tensor, n: int) -> Tensor:
    return x[..., : n + 1]


def choose(op: str, backend: str, systems: Systems) -> backends.Implementation:
    """The implementation that serves all the systems."""
    chosen = backends.choose(op, backend, *kinds(systems))
    if chosen.backend != "reference":
        backends.refuse_tangents(op, (x for member in systems.members for x in (member.Lambda, member.B, member.C)))
    return chosen


def kinds(systems: Systems) -> tuple[str, set[torch.dtype]]:
    """Device type and dtypes; of no systems those of nothing in particular."""
    tensors = [member.B for member in systems.members]
    return tensors[0].device.type if tensors else "cpu", {x.dtype for x in tensors} or {torch.float32}


def _refuse_unstable(systems: Systems, results: list[Tensor]) -> None:
    """Unstable systems give NaN: only then are they looked for, and only where that makes nobody wait."""
    if watched(results):
        return
    if any(x.device.type == "cpu" and isnan(x.detach().sum().item()) for x in results):
        systems.refuse_unstable()
