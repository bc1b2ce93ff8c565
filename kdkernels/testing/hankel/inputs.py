"""Seeded diagonal state-space models, most of them hostile, and their Hankel singular values to 50 digits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

FAMILIES = ("mamba", "clustered", "near circle", "real", "conjugate pairs", "LRU")


class SSM(NamedTuple):
    """h⁺ = Λh + Bu, y = Ch."""

    Lambda: Tensor  # (N, n)
    B: Tensor  # (N, n, m)
    C: Tensor  # (N, p, n)

    def to(self, dtype: torch.dtype) -> "SSM":
        """Rounded, or the same numbers in a wider dtype."""
        return SSM(*(x.to(dtype) for x in self))

    def leaves(self) -> "SSM":
        """Fresh tensors that want gradients."""
        return SSM(*(x.detach().requires_grad_() for x in self))


def make_systems(
    family: str = "LRU",
    N: int = 3,
    n: int = 16,
    m: int = 2,
    p: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> SSM:
    """N systems. `mamba` and `real` are real unless `dtype` is complex; the others complex.

    mamba: λ = exp(−0.05 k), values over 24 decades. clustered: within 1e-3 of each other. near circle: |λ| = 1 − 1e-6.
    """
    draw = torch.Generator().manual_seed(1000 * seed + n)
    p = m if p is None else p
    real = family in ("mamba", "real") and not (dtype is not None and dtype.is_complex)
    wide = torch.float64 if real else torch.complex128

    def uniform(low: float, high: float, size: int = n) -> Tensor:
        return low + (high - low) * torch.rand(N, size, generator=draw, dtype=torch.float64)

    B, C = (torch.randn(N, *shape, generator=draw, dtype=wide) for shape in ((n, m), (p, n)))
    if family == "mamba":
        Lambda = torch.exp(-0.05 * torch.arange(1, n + 1, dtype=torch.float64)).expand(N, n).to(wide)
    elif family == "real":
        Lambda = uniform(-0.99, 0.99).to(wide)
    elif family == "clustered":
        Lambda = torch.polar(uniform(0.9, 0.901), uniform(0.5, 0.501))
    elif family == "near circle":
        Lambda = torch.polar(torch.full((N, n), 1 - 1e-6, dtype=torch.float64), uniform(0, 2 * torch.pi))
    elif family == "conjugate pairs":
        half = torch.polar(uniform(0.5, 0.99, n // 2), uniform(0, 3, n // 2))
        Lambda = torch.cat([half, half.conj(), 0.5 * torch.ones(N, n % 2, dtype=wide)], -1)
        B[:, n // 2 : n // 2 * 2], C[..., n // 2 : n // 2 * 2] = B[:, : n // 2].conj(), C[..., : n // 2].conj()
    else:
        Lambda = torch.polar(uniform(0.5, 0.99), uniform(0, 2 * torch.pi))
    narrow = wide if dtype is None else dtype
    return SSM(*(x.to(narrow).to(device) for x in (Lambda, B, C)))


def reference_values(Lambda: Tensor, B: Tensor, C: Tensor, digits: int = 50) -> Tensor:
    """The Hankel singular values of one system, its numbers taken as exact: (n,) float64, by mpmath.

    The Gramians' Cholesky factors and the decomposition carry so many digits that `digits` are left of the smallest.
    """
    import mpmath as mp

    def matrix(x: Tensor) -> Any:
        return mp.matrix([[mp.mpmathify(entry) for entry in row] for row in x.tolist()])

    n = len(Lambda)
    if n == 0:
        return torch.zeros(0, dtype=torch.float64)
    with mp.workdps(4 * digits):
        poles = [mp.mpmathify(entry) for entry in Lambda.tolist()]
        factors = []
        for signs, generator in ((poles, matrix(B)), ([mp.conj(z) for z in poles], matrix(C).H)):
            product = generator * generator.H
            gramian = mp.matrix(n, n)
            for i in range(n):
                for j in range(n):
                    gramian[i, j] = product[i, j] / (1 - signs[i] * mp.conj(signs[j]))
            factors.append(cholesky(mp, gramian, mp.mpf(10) ** (-3 * digits)))
        L_c, L_o = factors
        values = mp.svd_c(L_o.H * L_c, compute_uv=False)
        return torch.tensor(sorted((float(mp.re(x)) for x in values), reverse=True), dtype=torch.float64)


def cholesky(mp: Any, gramian: Any, zero: Any) -> Any:
    """A pivoted factor; pivots below `zero` are none."""
    n = gramian.rows
    L, left = mp.matrix(n, n), list(range(n))
    for k in range(n):
        q = max(left, key=lambda i: mp.re(gramian[i, i]))
        d = mp.re(gramian[q, q])
        if d <= zero:
            break
        for i in left:
            L[i, k] = gramian[i, q] / mp.sqrt(d)
        for i in left:
            for j in left:
                gramian[i, j] -= L[i, k] * mp.conj(L[j, k])
        left.remove(q)
    return L


def frequency_response(Lambda: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
    """C (zI − Λ)⁻¹ B at each z: (F, p, m) of one system, in float64."""
    wide = torch.complex128
    inverse = 1 / (z[:, None] - Lambda.to(wide))  # (F, n)
    return torch.einsum("pi,fi,im->fpm", C.to(wide), inverse, B.to(wide))
