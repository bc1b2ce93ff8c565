"""Balanced truncation of diagonal state-space models, with a certificate.

With WᴴT = I and T, W diagonalising both Gramians, the first r columns project: A_r = W_rᴴ Λ T_r, B_r = W_rᴴ B,
C_r = C T_r (Moore 1981; the square-root form, no n × n inverse), and A_r = X Λ_r X⁻¹ makes it diagonal again. The
frequency response is then off by at most 2 Σ_{k>r} σ_k (Al-Saggaf and Franklin 1987, for discrete time).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdkernels import threads
from kdkernels.contract import check_count, check_number
from kdkernels.ops.hankel import reference, well_conditioned
from kdkernels.ops.hankel.api import choose
from kdkernels.ops.hankel.kernel import projectors, wide
from kdkernels.ops.hankel.native import LARGEST
from kdkernels.ops.hankel.systems import Operand, System, Systems, check

HOPELESS = 8  # ranks at which rounding alone is more than the error asked for: more states will not mend that
KEEP = 0.95  # a reduction by less than this share is not worth its change of basis (CompreSSM)
EPS = torch.finfo(torch.float64).eps
SIGMA_ERROR = 1e-9  # relative, of the Hankel singular values in float64


@dataclass(frozen=True)
class BalancedTruncation:
    """A reduced diagonal system, what it was made of, and how far off its frequency response may be."""

    Lambda: Tensor  # (..., r)
    B: Tensor  # (..., r, m)
    C: Tensor  # (..., p, r)
    singular_values: Tensor  # (..., n) of the system given, float64
    error_bound: Tensor  # (...): no |z| = 1 has a larger ‖G(z) − G_r(z)‖, rounding included, float64
    condition: Tensor  # (...) of the eigenvectors X, their columns scaled to 1; 1 where nothing was reduced, float64
    rank: int  # r
    projection: Tensor  # X⁻¹ W_rᴴ (..., r, n): old states to new
    lift: Tensor  # T_r X (..., n, r): new states to old

    @property
    def reduced(self) -> bool:
        """Whether any state was taken away."""
        return self.rank < self.singular_values.shape[-1]

    def transport(self, x: Tensor) -> Tensor:
        """Vectors of the state space in the new basis: (..., n, k) -> (..., r, k), X⁻¹ W_rᴴ x.

        So move states (k of them beside each other) and B.
        """
        dtype = torch.promote_types(self.projection.dtype, x.dtype)
        return self.projection.to(dtype) @ x.to(dtype)

    def transport_dual(self, x: Tensor) -> Tensor:
        """Functionals on the state space in the new basis: (..., k, n) -> (..., k, r), x T_r X.

        So move C, and gradients with respect to states: with torch's convention the gradient of B, and an optimiser's
        first moment of it, moves as `transport_dual(x.mH).mH`, that of C as `transport(x.mH).mH`. Second moments and
        everything of Lambda do not move linearly: reset those.
        """
        dtype = torch.promote_types(self.lift.dtype, x.dtype)
        return x.to(dtype) @ self.lift.to(dtype)


@dataclass(frozen=True)
class Order:
    """How many states a system keeps: exactly one of the three, as in `balanced_truncation`."""

    rank: int | None = None
    tolerance: float | None = None
    error: float | None = None

    def least(self, sigma: Tensor) -> int:
        """The rank that the Hankel singular values (..., n) suggest."""
        n = sigma.shape[-1]
        if self.rank is not None:
            return self.rank
        if self.tolerance is not None:
            rank = _needed(sigma, self.tolerance)
            return rank if rank < KEEP * n else n
        assert self.error is not None
        tails = sigma.flip(-1).cumsum(-1).flip(-1)  # of the ranks 0 … n − 1
        ranks = (2 * tails > float(self.error)).sum(-1)
        return max(1, int(ranks.max())) if ranks.numel() else n


def balanced_truncation(
    Lambda: Operand,
    B: Operand,
    C: Operand,
    *,
    rank: int | Sequence[int] | None = None,
    tolerance: float | None = None,
    error: float | None = None,
    backend: str = "auto",
) -> Any:
    """The diagonal system of lower order r that keeps the largest Hankel singular values of h⁺ = Λh + Bu, y = Ch.

    Everything is computed in float64, without gradients, eagerly: it is not for torch.compile. On the CPU each of
    torch's threads takes systems of a list, and results have the same bits for every number of threads.

    Args:
        Lambda: (..., n), real or complex, float32 or float64, |λ| < 1.
        B: (..., n, m).
        C: (..., p, n). Leading dimensions broadcast. Or each a list of such tensors, systems of different sizes.
        rank: r, exactly; at least 1 and at most n. For lists also a list, one for each system.
        tolerance: τ ≥ 0: the smallest r whose Σ_{k≤r} σ_k / Σσ_k ≥ 1 − τ, and nothing is reduced unless r < 0.95 n
            (CompreSSM, arXiv 2510.02823).
        error: ε ≥ 0: the smallest r whose `error_bound` is at most ε, which is absolute: no input sequence then changes
            the output sequence by more than ε times its own l2 norm. Where rounding alone is more than ε, nothing is
            reduced. Systems in leading dimensions get one rank, for tolerance and error the largest that any of them
            needs; the systems of a list get each their own.
        backend: `"auto"`, `"reference"` or `"native"`: what computes the Hankel singular values and their vectors. One
            that was asked for by name and cannot serve raises.

    Returns:
        `BalancedTruncation`, for lists a list of them. Lambda, B and C are in the dtype given, but complex where a real
        system's eigenvalues are.

        Where a reduced system would not be stable in that dtype, or cannot be made diagonal, the next greater rank is
        taken, and at last the system as it was: `rank` says which. The error bound is that of what is returned.

    Raises:
        TypeError: an argument is no tensor of these dtypes; in a list the message says which.
        ValueError: shapes, devices or options do not fit, a system is not finite, or some |λ| ≥ 1.
    """
    systems = check(Lambda, B, C)
    found = reduce_all(systems, orders(systems, rank, tolerance, error), backend)
    return found if systems.is_list else found[0]


def orders(
    systems: Systems, rank: int | Sequence[int] | None, tolerance: float | None, error: float | None
) -> list[Order]:
    """What each system keeps. Raises unless exactly one of the three says so."""
    if sum(x is not None for x in (rank, tolerance, error)) != 1:
        raise ValueError("rank, tolerance and error: exactly one of them must be given")
    count = len(systems.members)
    if rank is None:
        for name, value in (("tolerance", tolerance), ("error", error)):
            if value is not None:
                check_number(name, value)
        return [Order(tolerance=tolerance, error=error)] * count
    several = isinstance(rank, (list, tuple))
    if several and not systems.is_list:
        raise TypeError(f"rank is {type(rank).__name__}, but must be a whole number, as Lambda is no list")
    ranks: Sequence[int] = rank if several else [rank] * count  # type: ignore[assignment,list-item]
    if len(ranks) != count:
        raise ValueError(f"rank has {len(ranks)} numbers, but must have {count}, as Lambda has systems")
    if not several:
        check_count("rank", rank)
    for i, (r, member) in enumerate(zip(ranks, systems.members, strict=True)):
        name = f"rank[{i}]" if several else "rank"
        check_count(name, r)
        if r > member.order:
            which = f"Lambda[{i}]" if systems.is_list else "Lambda"
            raise ValueError(f"{name} is {r}, but must be at most n = {member.order}, as in {which}")
    return [Order(rank=int(r)) for r in ranks]


def _as_it_is(i: int, reduced: BalancedTruncation) -> BalancedTruncation:
    return reduced


def reduce_all(
    systems: Systems,
    orders: Sequence[Order],
    backend: str,
    store: Callable[[int, BalancedTruncation], BalancedTruncation] = _as_it_is,
) -> list[BalancedTruncation]:
    """Every system reduced. `store` rounds the i-th to how it will be kept, which its error bound then includes."""
    chosen = choose("balanced_truncation", backend, systems).backend

    def reduced(i: int) -> BalancedTruncation:
        return _truncate(systems, i, orders[i], chosen, store)

    return threads.each(
        reduced, range(len(orders)), on_cpu=all(member.B.device.type == "cpu" for member in systems.members)
    )


def _truncate(
    systems: Systems,
    i: int,
    order: Order,
    backend: str,
    store: Callable[[int, BalancedTruncation], BalancedTruncation],
) -> BalancedTruncation:
    system = systems.members[i]
    for name, x in (("Lambda", system.Lambda), ("B", system.B), ("C", system.C)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name}{f'[{i}]' if systems.is_list else ''} is not finite")
    sigma, sides = _balance(system, backend)
    if bool(sigma.isnan().any()):
        systems.refuse_unstable()
    if not bool(sigma.isfinite().all()):
        raise ValueError("B and C are too large: their Hankel singular values leave float64's range")
    hopeless = 0
    for r in range(order.least(sigma), system.order):
        reduced = _reduce(system, sigma, *sides(r), r)
        if reduced is None:
            continue
        reduced = store(i, reduced)
        if order.error is None or bool((reduced.error_bound <= order.error).all()):
            return reduced
        rounding = reduced.error_bound - 2 * sigma[..., r:].sum(-1)
        hopeless += bool((rounding > order.error).any())
        if hopeless == HOPELESS:
            break
    return _untruncated(system, sigma)


def _balance(system: System, backend: str) -> tuple[Tensor, Callable[[int], tuple[Tensor, Tensor]]]:
    """σ, and of r the first r columns of T and of W, in float64, with the system's leading dimensions."""
    flat = system.flat()
    Lambda, B, C = (wide(x) for x in (flat.Lambda, flat.B, flat.C))
    factored = None
    if backend == "reference":
        sigma, T, W = reference.balance(Lambda, B, C)
    elif system.order <= LARGEST or (factored := well_conditioned.decompose(Lambda, B, C)) is None:
        from kdkernels.ops.hankel import schema

        sigma, T, W = schema.hankel_singular_values.whole(Lambda, B, C, 0, True)
    else:
        L_c, L_o, U, sigma, Vh = factored

    def sides(r: int) -> tuple[Tensor, Tensor]:
        if factored is None:
            found = (T[..., :r], W[..., :r])
        else:
            found = projectors(L_c, L_o, U[..., :r], sigma, Vh[..., :r, :])
        left, right = (x.reshape(*system.leading, *x.shape[1:]) for x in found)
        return left, right

    return sigma.reshape(*system.leading, system.order), sides


def _needed(sigma: Tensor, tolerance: float) -> int:
    """The largest of the systems' ranks."""
    total = sigma.sum(-1, keepdim=True)
    short = sigma.cumsum(-1) < (1 - float(tolerance)) * total
    # the last sum is the total but for its rounding
    ranks = (short[..., :-1].sum(-1) + 1) if sigma.shape[-1] else short.sum(-1)
    return int(ranks.max()) if ranks.numel() else sigma.shape[-1]


def _reduce(system: System, sigma: Tensor, T: Tensor, W: Tensor, r: int) -> BalancedTruncation | None:
    """The system of order r, of which T and W are the projectors, or None where it is not stable or not diagonal."""
    Lambda, B, C = map(wide, (system.Lambda, system.B, system.C))
    scaled = Lambda.unsqueeze(-1) * T
    A_r, B_r, C_r = W.mH @ scaled, W.mH @ B, C @ T
    eigenvalues, X = torch.linalg.eig(A_r)
    if not A_r.is_complex() and not bool(eigenvalues.imag.any()):
        eigenvalues, X = eigenvalues.real, X.real
    sizes = torch.linalg.svdvals(X)
    if not bool((sizes[..., -1] > 4 * r * EPS * sizes[..., 0]).all()):
        return None
    condition = sizes[..., 0] / sizes[..., -1]
    Q, R = torch.linalg.qr(X)
    inverse = torch.linalg.solve_triangular(R, Q.mH, upper=True)  # batched LU fails for large complex X (torch 2.13)
    left, B_d = inverse @ W.mH.to(X.dtype), inverse @ B_r.to(X.dtype)
    lift, C_d = T.to(X.dtype) @ X, C_r.to(X.dtype) @ X
    dtype = torch.promote_types(system.B.dtype, torch.complex64) if X.is_complex() else system.B.dtype
    rounded = tuple(x.to(dtype) for x in (eigenvalues, B_d, C_d))
    radius, radius_rounded = eigenvalues.abs(), wide(rounded[0]).abs()
    if not bool((radius < 1).all() and (radius_rounded < 1).all() and condition.isfinite().all()):
        return None
    # what rounding may have done to A_r, B_r and C_r, element by element, and what solving did
    n = system.order
    size_W, size_T, size_X, magnified = _size(W).mT, _size(T), _size(X), _size(inverse)
    error_A = EPS * (n + 4) * (size_W @ _size(scaled))
    error_A = error_A + _size(A_r.to(X.dtype) @ X - X * eigenvalues.unsqueeze(-2)) @ magnified
    error_B = EPS * (n + 4) * (size_W @ _size(B)) + _size(X @ B_d - B_r)
    error_C = EPS * (n + r + 8) * (_size(C) @ size_T)
    gain = 1 / (1 - torch.maximum(radius, radius_rounded))  # of |1/(z − λ)|
    out, into = C_d.norm(dim=-2) * gain, B_d.norm(dim=-1) * gain
    moved = torch.einsum("...i,...ij,...j", out, magnified @ error_A @ size_X, into)
    moved = moved + (out * (magnified @ error_B).norm(dim=-1)).sum(-1)
    moved = moved + ((error_C @ size_X).norm(dim=-2) * into).sum(-1)
    wide_rounded = tuple(map(wide, rounded))
    moved = moved + distance((eigenvalues, B_d, C_d), wide_rounded, gain)
    tail = (1 + SIGMA_ERROR) * 2 * sigma[..., r:].sum(-1) + 2 * n * EPS * sigma[..., :1].sum(-1) * (n - r)
    return BalancedTruncation(
        rounded[0],
        rounded[1],
        rounded[2],
        singular_values=sigma,
        error_bound=tail + 2 * moved,
        condition=condition,
        rank=r,
        projection=left,
        lift=lift,
    )


def _size(x: Tensor) -> Tensor:
    """|Re x| + |Im x|: at least |x|, in a tenth of its time."""
    return x.real.abs() + x.imag.abs() if x.is_complex() else x.abs()


def distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...], gain: Tensor) -> Tensor:
    """A bound of ‖G_a(z) − G_b(z)‖ on |z| = 1, mode by mode: ‖c b‖/|z − λ| of two neighbours.

    `gain` is 1/(1 − |λ|) of the one nearer to the circle.
    """
    (pole, B, C), (pole_b, B_b, C_b) = a, b
    change_B, change_C = (B - B_b).norm(dim=-1), (C - C_b).norm(dim=-2)
    size_B, size_C = B.norm(dim=-1), C_b.norm(dim=-2)
    modes = change_C * size_B + size_C * change_B + C.norm(dim=-2) * size_B * (pole - pole_b).abs() * gain
    return (modes * gain).sum(-1)


def _untruncated(system: System, sigma: Tensor) -> BalancedTruncation:
    n = system.order
    ones = torch.ones(system.leading, dtype=torch.float64, device=sigma.device)
    eye = torch.eye(n, dtype=wide(system.B).dtype, device=sigma.device).expand(*system.leading, n, n)
    return BalancedTruncation(
        system.Lambda, system.B, system.C, singular_values=sigma, error_bound=0 * ones, condition=ones, rank=n,
        projection=eye, lift=eye,
    )  # fmt: skip
