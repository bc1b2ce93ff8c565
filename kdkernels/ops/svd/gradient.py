"""The gradient of a singular value decomposition (Wan and Zhang 2019, arXiv 1909.02659), from U, S, Vᴴ alone.

With Φ_U and Φ_V the skew parts X − Xᴴ of Uᴴ ∂U and Vᴴ ∂V,

    ∂A = U (diag(∂S) + K) Vᴴ + (I − UUᴴ) ∂U S⁻¹ Vᴴ + U S⁻¹ ∂Vᴴ (I − VVᴴ)
    K_ij = (Φ_U + Φ_V)_ij / 2(s_j − s_i) + (Φ_U − Φ_V)_ij / 2(s_j + s_i)

where the first quotient is absent for i = j. This form never subtracts squares. Singular values alone need none of it.

Where s_i and s_j agree to half their digits the first quotient is 0/0 (pytorch #49886, jax #2311). ∂U, ∂S and ∂Vᴴ do
not determine its limit, but they do for a function of U diag(g(S)) Vᴴ with the gradient G there (or of U diag(g(S)) Uᴴ,
or the same of V), plus one of S alone, Σ h(s_i). With H the Hermitian part of UᴴGV and P = (Uᴴ ∂U + Vᴴ ∂V)/2,

    the limit is g'(σ) H_ij,    P_ij = g(σ) H_ij,    ∂S_i = g'(σ) H_ii + h'(σ)

so that it is P_ij times the slope g'/g of the line through the points (P_ll, ∂S_l) of all values that agree with them.
Without ∂S, as of projectors and polar factors, g' is 0.
"""

from typing import Any

import torch
from torch import Tensor

from kdkernels.library import watched


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """What `differentiate` needs."""
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)  # a ∂S that is absent says more than zeros


def differentiate(ctx: Any, dU: Tensor | None, dS: Tensor | None, dVh: Tensor | None) -> Tensor:
    """`backward` as autograd calls it."""
    U, S, Vh = ctx.saved_tensors
    with torch.autocast(U.device.type, enabled=False):
        return backward(U, S, Vh, dU, dS, dVh)


def backward(U: Tensor, S: Tensor, Vh: Tensor, dU: Tensor | None, dS: Tensor | None, dVh: Tensor | None) -> Tensor:
    """The gradient of the matrix; an output that has none is None."""
    if dU is None and dVh is None:
        return (U * dS.unsqueeze(-2)) @ Vh if dS is not None else torch.zeros_like(U @ Vh)
    if S.shape[-1] == 0:
        return U @ Vh
    inner_U, inner_V = U.mH @ dU if dU is not None else None, Vh @ dVh.mH if dVh is not None else None
    skew_U, skew_V = skew(inner_U), skew(inner_V)
    total, difference = half_sum(skew_U, skew_V, 1), half_sum(skew_U, skew_V, -1)
    own, other = S.unsqueeze(-1), S.unsqueeze(-2)
    alike = (other - own).abs() <= torch.finfo(S.dtype).eps ** 0.5 * (other + own)  # i = j among them
    inner = torch.where(alike, 0, total / torch.where(alike, 1, other - own)) + quotient(difference, other + own)
    if dS is not None:
        pairs = alike & ~torch.eye(S.shape[-1], dtype=torch.bool, device=S.device)
        if watched((S,)) or S.device.type != "cpu" or pairs.any():  # on a device the question would cost more
            inner = inner + torch.where(pairs, limit(half_sum(inner_U, inner_V, 1), S, dS, alike), 0)
        inner = inner + torch.diag_embed(dS).to(inner.dtype)
    grad = U @ inner @ Vh
    if dU is not None and U.shape[-2] > U.shape[-1]:
        grad = grad + quotient(dU - U @ (U.mH @ dU), S.unsqueeze(-2)) @ Vh
    if dVh is not None and Vh.shape[-1] > Vh.shape[-2]:
        grad = grad + U @ quotient(dVh - (dVh @ Vh.mH) @ Vh, S.unsqueeze(-1))
    return grad


def limit(P: Tensor, S: Tensor, dS: Tensor, alike: Tensor) -> Tensor:
    """P times the slope of ∂S over its diagonal among values that are alike: of the line that least squares find.

    Where the diagonal of P is constant the line goes through 0: the function has no part of S alone. Where that
    diagonal is 0 the slope is 1/σ, as for U diag(S) Vᴴ. Each takes over from the one before by a small weight, not by a
    branch: more than the squares of what rounding and the spread of S leave of it, less than what it may disturb.
    """
    eps = torch.finfo(S.dtype).eps
    share = alike.to(S.dtype) / alike.sum(-1, keepdim=True)
    largest = torch.where(alike, P.abs(), 0).amax(-1, keepdim=True)
    largest = torch.where(alike, largest.mT, 0).amax(-1, keepdim=True)  # (..., k, 1): in the block of those alike
    scale = torch.where(largest == 0, 1, largest)  # squares of what is scaled stay in range
    s, x, y = (torch.where(alike, z.unsqueeze(-2), 0) for z in (S, P.diagonal(dim1=-2, dim2=-1).real, dS))
    x = x / scale
    (mean_s, ds), (mean_x, dx), (mean_y, dy) = (centred(share, z) for z in (s, x, y))
    spread = quotient(ds.square(), mean_s.square()).sum(-1, keepdim=True)
    through_zero, unknown = eps + spread / eps**0.5, eps**1.5
    product = (dx * dy).sum(-1, keepdim=True) + through_zero * mean_x * mean_y
    square = dx.square().sum(-1, keepdim=True) + through_zero * mean_x.square()
    slope = (product + unknown * quotient(scale, S.unsqueeze(-1))) / (square + unknown) / scale
    return slope * P


def centred(share: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' means and the distances from them, weighted for sums of products."""
    mean = (share * x).sum(-1, keepdim=True)
    return mean, share.sqrt() * (x - mean)


def quotient(x: Tensor, by: Tensor) -> Tensor:
    """x / by, and 0 where a singular value of 0 says nothing."""
    return torch.where(by == 0, 0, x / torch.where(by == 0, 1, by))


def skew(x: Tensor | None) -> Tensor | None:
    """X − Xᴴ."""
    return None if x is None else x - x.mH


def half_sum(a: Tensor | None, b: Tensor | None, sign: int) -> Tensor:
    """(a ± b)/2, where one may be absent."""
    if a is None:
        assert b is not None
        return 0.5 * sign * b
    return 0.5 * a if b is None else 0.5 * (a + sign * b)
