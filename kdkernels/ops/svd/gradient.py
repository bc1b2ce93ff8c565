"""The gradient of a singular value decomposition (Wan and Zhang 2019, arXiv 1909.02659), from U, S, Vᴴ alone.

With Φ_U and Φ_V the skew parts X − Xᴴ of Uᴴ ∂U and Vᴴ ∂V,

    ∂A = U (diag(∂S) + K) Vᴴ + (I − UUᴴ) ∂U S⁻¹ Vᴴ + U S⁻¹ ∂Vᴴ (I − VVᴴ)
    K_ij = (Φ_U + Φ_V)_ij / 2(s_j − s_i) + (Φ_U − Φ_V)_ij / 2(s_j + s_i)

where the first quotient is absent for i = j. This form never subtracts squares. Singular values alone need none of it.
"""

from typing import Any

import torch
from torch import Tensor


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """What `differentiate` needs."""
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)  # zeros would meet 1/(s_j − s_i) at repeated values


def differentiate(ctx: Any, dU: Tensor | None, dS: Tensor | None, dVh: Tensor | None) -> Tensor:
    """`backward` as autograd calls it."""
    U, S, Vh = ctx.saved_tensors
    with torch.autocast(U.device.type, enabled=False):
        return backward(U, S, Vh, dU, dS, dVh)


def backward(U: Tensor, S: Tensor, Vh: Tensor, dU: Tensor | None, dS: Tensor | None, dVh: Tensor | None) -> Tensor:
    """The gradient of the matrix; an output that has none is None."""
    if dU is None and dVh is None:
        return (U * dS.unsqueeze(-2)) @ Vh if dS is not None else torch.zeros_like(U @ Vh)
    skew_U, skew_V = skew(U.mH @ dU) if dU is not None else None, skew(Vh @ dVh.mH) if dVh is not None else None
    total, difference = half_sum(skew_U, skew_V, 1), half_sum(skew_U, skew_V, -1)
    own, other = S.unsqueeze(-1), S.unsqueeze(-2)
    diagonal = torch.eye(S.shape[-1], dtype=torch.bool, device=S.device)
    gap = torch.where(diagonal, 1, other - own)
    both = torch.where(diagonal & (not U.is_complex()), 1, other + own)
    inner = torch.where(diagonal, 0, total / gap) + difference / both
    if dS is not None:
        inner = inner + torch.diag_embed(dS).to(inner.dtype)
    grad = U @ inner @ Vh
    if dU is not None and U.shape[-2] > U.shape[-1]:
        grad = grad + ((dU - U @ (U.mH @ dU)) / S.unsqueeze(-2)) @ Vh
    if dVh is not None and Vh.shape[-1] > Vh.shape[-2]:
        grad = grad + (U / S.unsqueeze(-2)) @ (dVh - (dVh @ Vh.mH) @ Vh)
    return grad


def skew(x: Tensor) -> Tensor:
    """X − Xᴴ."""
    return x - x.mH


def half_sum(a: Tensor | None, b: Tensor | None, sign: int) -> Tensor:
    """(a ± b)/2, where one may be absent."""
    if a is None:
        assert b is not None
        return 0.5 * sign * b
    return 0.5 * a if b is None else 0.5 * (a + sign * b)
