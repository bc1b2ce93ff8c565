"""The gradient of functions of Hankel singular values, without 1/(σ_i² − σ_j²).

With g = ∂f/∂σ, G = ½ W diag(g) Wᴴ and H = ½ T diag(g) Tᴴ are the gradients of the Gramians P and Q, and

    ∂B = 2 (G ∘ κ*) B,    ∂C = 2 C (H ∘ κ),    ∂λ = 2 [κ'* ∘ (G ∘ (BBᴴ)* + H* ∘ CᴴC)] λ

in torch's convention for complex gradients, κ at z_ij = λ_i λ_j*. (For κ = 1/(1 − z) the last is 2 diag(ĜΛP + QΛĤ).)
∂B and ∂λ are computed as conjugates, from G* and κ, which spares passes over n × n numbers: next to two products they
are what it costs. Symmetric functions have it at repeated values too; a σ of 0 contributes nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.ops.hankel.kernel import kappa, wide


def backward(
    grad: Tensor,
    Lambda: Tensor,
    B: Tensor,
    C: Tensor,
    T: Tensor,
    W: Tensor,
    horizon: int | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of Lambda (N, n), B (N, n, m) and C (N, p, n) that are needed, in their dtype."""
    dtype, given = B.dtype, Lambda.dtype
    Lambda, B, C, g = wide(Lambda), wide(B), wide(C), grad.to(torch.float64).unsqueeze(-2)
    value, slope = kappa(Lambda, horizon, given)
    need_Lambda, need_B, need_C = needs
    found: list[Tensor | None] = [None, None, None]
    G = H = None  # 2 G* and 2 H
    if need_Lambda or need_B:
        W = W.conj_physical()
        G = (W * g) @ W.mH
    if need_Lambda or need_C:
        H = (T * g) @ T.mH
    if need_Lambda:
        assert G is not None and H is not None
        inner = (B @ B.mH).mul_(G).add_((C.mT @ C.mT.mH).mul_(H)).mul_(slope)
        found[0] = (inner @ Lambda.conj_physical().unsqueeze(-1)).squeeze(-1).conj_physical()
    if need_B:
        assert G is not None
        found[1] = (G.mul_(value) @ B.conj_physical()).conj_physical()
    if need_C:
        assert H is not None
        found[2] = C @ H.mul_(value)
    return [None if x is None else x.to(dtype) for x in found]
