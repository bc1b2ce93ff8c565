"""Gramian factors and Hankel singular values in plain PyTorch: on any device, differentiable any way.

For h⁺ = Λh + Bu, y = Ch with |λ| < 1, the Gramians are P = Σ Λ^k BBᴴ Λ*^k and Q = Σ Λ*^k CᴴC Λ^k, and the Hankel
singular values σ = sqrt(eig(PQ)) = svd(L_oᴴ L_c), where P = L_c L_cᴴ and Q = L_o L_oᴴ. The factors come from a pivoted
Cholesky factorisation of the generator B, which never forms P: every pivot is at least 0 and what is left is its exact
error. Because of that the derivatives of its first columns are those of all of P, also where P has a lower rank.

All of it is float64, for float32 inputs too. The decomposition is LAPACK's: a σ is right to about n ε σ_1, so in
float64 the smallest of a graded system are not. A system with a NaN, an infinity or |λ| ≥ 1 gives NaN.
"""

from math import isfinite

import torch
from torch import Tensor

from kdkernels.library import watched
from kdkernels.ops.hankel.kernel import compensated, horizon_factor, kappa, one_minus_product, projectors, wide
from kdkernels.ops.svd import reference as decomposition


def gramian_factors(Lambda: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(..., n), (..., n, m), (..., p, n) -> L_c, L_o (..., n, n) and the residuals of their traces (..., n + 1)."""
    (Lambda_, B_, C_), poison = isolate(Lambda, B, C, None)
    L_c, residual_c = generator_cholesky(Lambda_, B_)
    L_o, residual_o = generator_cholesky(Lambda_.conj(), C_.mH)
    matrix, vector = poison[..., None, None], poison[..., None]
    factors = ((L + matrix).to(B.dtype) for L in (L_c, L_o))
    residuals = ((r + vector).to(B.real.dtype) for r in (residual_c, residual_o))
    return (*factors, *residuals)  # type: ignore[return-value]


def hankel_singular_values(Lambda: Tensor, B: Tensor, C: Tensor, horizon: int | None = None) -> Tensor:
    """(..., n) real, descending, in the dtype of the system."""
    (Lambda_, B_, C_), poison = isolate(Lambda, B, C, horizon)
    L_c, L_o = factors(Lambda_, B_, C_, horizon)
    sigma = decomposition.svdvals(L_o.mH @ L_c)
    return (sigma + poison[..., None]).to(B.real.dtype)


def balance(Lambda: Tensor, B: Tensor, C: Tensor, horizon: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """σ, T = L_c V Σ^-1/2 and W = L_o U Σ^-1/2, all in float64: WᴴT = I, and T and W diagonalise both Gramians."""
    (Lambda_, B_, C_), poison = isolate(Lambda, B, C, horizon)
    L_c, L_o = factors(Lambda_, B_, C_, horizon)
    U, sigma, Vh = decomposition.svd(L_o.mH @ L_c)
    T, W = projectors(L_c, L_o, U, sigma, Vh)
    matrix = poison[..., None, None]
    return sigma + poison[..., None], T + matrix, W + matrix


def factors(Lambda: Tensor, B: Tensor, C: Tensor, horizon: int | None) -> tuple[Tensor, Tensor]:
    """L_c and L_o."""
    if horizon is not None:
        return horizon_factor(Lambda, B, horizon), horizon_factor(Lambda.conj(), C.mH, horizon)
    return generator_cholesky(Lambda, B)[0], generator_cholesky(Lambda.conj(), C.mH)[0]


def generator_cholesky(Lambda: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """L (..., n, n) with BBᴴ ∘ κ = LLᴴ, column k that of the k-th pivot, and the trace not yet explained (..., n + 1).

    Of the rows left, the pivot q has the largest ‖b_i‖²/(1 − |λ_i|²). With u = b_qᴴ/‖b_q‖ and the Blaschke factor
    φ(z) = (z − λ_q)/(1 − λ_q* z), the others go on as b_i + (φ(λ_i) − 1)(b_i u)uᴴ.
    """
    n = Lambda.shape[-1]
    denominator = one_minus_product(Lambda, Lambda).real
    place = torch.arange(n, device=Lambda.device)
    left = torch.ones_like(denominator)
    columns, residuals = [], []
    for _ in range(n):
        pivots = left * (B * B.conj()).real.sum(-1) / denominator
        residuals.append(pivots.sum(-1))
        q = (pivots.detach() - (1 - left)).argmax(-1, keepdim=True)  # a row that is used up has -1
        d, lambda_q = pivots.gather(-1, q), Lambda.gather(-1, q)
        b_q = B.gather(-2, q.unsqueeze(-1).expand(*q.shape, B.shape[-1]))  # (..., 1, m)
        some = d > 0
        inner = (B * b_q.conj()).sum(-1)  # b_i b_qᴴ
        below = one_minus_product(Lambda, lambda_q.expand_as(Lambda))
        columns.append(torch.where(some & (left > 0), inner / below * torch.where(some, d, 1).rsqrt(), 0))
        phi = (Lambda - lambda_q) / below
        if B.shape[-1] == 1:
            B = phi.unsqueeze(-1) * B
        else:
            length = (b_q * b_q.conj()).real.sum(-1)  # (..., 1)
            parallel = (inner / torch.where(some, length, 1)).unsqueeze(-1) * b_q  # (b_i u)uᴴ
            B = torch.where(some.unsqueeze(-1), (B - parallel) + phi.unsqueeze(-1) * parallel, B)
        left = left * (place != q)
    residuals.append(torch.zeros_like(Lambda.real.sum(-1)))
    L = torch.stack(columns, -1) if n else B.new_zeros(*B.shape[:-2], 0, 0)
    return L, torch.stack(residuals, -1)


def hankel_energy(Lambda: Tensor, B: Tensor, C: Tensor, horizon: int | None = None) -> Tensor:
    """Σσ² = tr(PQ) = Σ_ij (BBᴴ)_ij (CᴴC)_ji κ(λ_i λ_j*)²: (...)."""
    Lambda_, B_, C_ = map(wide, (Lambda, B, C))
    value, slope = kappa(Lambda_, horizon, Lambda.dtype)
    energy = ((B_ @ B_.mH) * (C_.mH @ C_).mT * (slope if horizon is None else value * value)).real.sum((-2, -1))
    if horizon is None and _plainly_good(value, energy):
        return energy.to(B.real.dtype)
    good = B_.detach().isfinite().all(-1).all(-1) & C_.detach().isfinite().all(-1).all(-1)
    if horizon is None:  # 1/κ of a state with itself is 1 − |λ|², above 0 where the state is stable
        good = good & (value.detach().diagonal(0, -2, -1).real.reciprocal() > 0).all(-1)
    else:
        good = good & Lambda_.detach().isfinite().all(-1)
        energy = energy + 0 * Lambda_.real.sum(-1)  # one step does not depend on it, but its gradient is 0
    # a factor, so that the gradients of what cannot be served are NaN too; no system meets another's numbers
    return (energy * torch.where(good, torch.ones_like(energy), torch.nan)).to(B.real.dtype)


def _plainly_good(kappa: Tensor, energy: Tensor) -> bool:
    """Whether one look says that every system is stable and finite: on the CPU, where nobody waits for it."""
    if energy.device.type != "cpu" or watched((kappa, energy)) or not kappa.numel():
        return False
    own = kappa.detach().diagonal(0, -2, -1).real
    return isfinite(energy.detach().sum().item()) and own.min().item() > 0 and isfinite(own.max().item())


def isolate(Lambda: Tensor, B: Tensor, C: Tensor, horizon: int | None) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The systems in float64 with those that cannot be served replaced by 0, and (...): NaN for those, else 0.

    The second depends on the systems, so that their gradients are NaN too.
    """
    tensors = tuple(map(wide, (Lambda, B, C)))
    good = tensors[0].detach().isfinite().all(-1)
    if horizon is None:
        good = good & inside(tensors[0].detach()).all(-1)
    for x in tensors[1:]:
        good = good & x.detach().isfinite().all(-1).all(-1)
    weight = torch.where(good, 0.0, torch.nan)
    poison = sum(torch.where(expand(good, axes), 0, x).real.sum(axes) for x, axes in zip(tensors, AXES, strict=True))
    clean = tuple(torch.where(expand(good, axes), x, 0) for x, axes in zip(tensors, AXES, strict=True))
    return clean, poison * weight  # type: ignore[return-value]


AXES = ((-1,), (-2, -1), (-2, -1))  # of Lambda, B and C, behind the leading dimensions


def expand(good: Tensor, axes: tuple[int, ...]) -> Tensor:
    """(...) -> (..., 1) or (..., 1, 1)."""
    for _ in axes:
        good = good.unsqueeze(-1)
    return good


def inside(Lambda: Tensor) -> Tensor:
    """|λ| < 1, decided without the rounding of |λ|."""
    return compensated(Lambda, Lambda).real > 0
