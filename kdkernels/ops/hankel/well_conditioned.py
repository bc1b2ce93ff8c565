"""Gramian factors by LAPACK's Cholesky, where that is as good as the generator's and much sooner done: many states.

With D² the diagonal of P and H = D⁻¹ P D⁻¹, what rounding does to H is at most c n ε, and P is exactly factored up to
a share of at most c n ε ‖H⁻¹‖ of itself in every direction (Demmel 1989, LAPACK working note 14). So is every Hankel
singular value up to such a share, the smallest too. Where B has many columns, or its rows point anywhere, ‖H⁻¹‖ is 1 to
1000; where the share could be too large there is no factor, and the generator's Cholesky has its turn.
"""

import torch
from torch import Tensor

from kdkernels.ops.hankel.kernel import compensated

SHARE = 1e-10  # of every singular value, at most
STEPS = 6  # of the power iteration for ‖H⁻¹‖, whose estimate is within a small factor, as c is


def decompose(Lambda: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """L_c, L_o and U, σ, Vᴴ of L_oᴴ L_c, in float64, or None: (N, n), (N, n, m), (N, p, n) -> (N, n, n), σ (N, n)."""
    L_c = factor(Lambda, B)
    L_o = None if L_c is None else factor(Lambda.conj_physical(), C.mT.conj_physical())
    if L_c is None or L_o is None:
        return None
    return L_c, L_o, *torch.linalg.svd(L_o.mH @ L_c, full_matrices=False)


def factor(Lambda: Tensor, B: Tensor) -> Tensor | None:
    """L with BBᴴ ∘ κ = LLᴴ, or None; the device is waited for.

    Of systems that are not stable, or not finite, there is none.
    """
    # 1 − λ_i λ_j* = (1 − |λ_i|²) + λ_i (λ_i − λ_j)*, and neither term is much larger than the sum: none cancels
    left = Lambda.unsqueeze(-1)
    own = compensated(Lambda, Lambda).real
    P = (B @ B.mH) / (own.unsqueeze(-1) + left * (left - Lambda.unsqueeze(-2)).conj_physical())
    size = P.diagonal(0, -2, -1).real
    if not bool((size > 0).all() and size.isfinite().all()):
        return None
    D = size.sqrt()
    scale = 1 / D
    L, failed = torch.linalg.cholesky_ex(P * (scale.unsqueeze(-1) * scale.unsqueeze(-2)))
    if bool(failed.any()):
        return None
    n = Lambda.shape[-1]
    share = n * torch.finfo(torch.float64).eps * inverse_norm(L)
    return D.unsqueeze(-1) * L if bool((share <= SHARE).all()) else None


def inverse_norm(L: Tensor) -> Tensor:
    """‖(LLᴴ)⁻¹‖ of each (N, n, n), estimated from below."""
    n = L.shape[-1]
    draw = torch.Generator(L.device).manual_seed(0)
    x = torch.randn(n, 2, generator=draw, dtype=L.dtype, device=L.device).expand(*L.shape[:-2], n, 2)
    found = L.new_zeros(L.shape[:-2], dtype=torch.float64)
    for _ in range(STEPS):
        x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True)
        x = torch.linalg.solve_triangular(L, x, upper=False)
        x = torch.linalg.solve_triangular(L.mH, x, upper=True)
        found = torch.linalg.vector_norm(x, dim=-2).amax(-1)
    return found
