"""What a diagonal system's Gramians divide by: P = BBᴴ ∘ κ(λ_i λ_j*) and Q = CᴴC ∘ κ(λ_i* λ_j).

    κ(z) = 1/(1 − z) = Σ_k z^k, or Σ_{k<L} z^k for a horizon of L steps

Near the unit circle 1 − z cancels: it is formed from products without rounding.

Conjugates are formed, never lazy: an operator that runs beneath torch.compile's autograd does not see torch's conjugate
bit in products of elements (torch 2.13).
"""

import torch
from torch import Tensor

from kdkernels.ops.hankel.once import once

SPLIT = 2.0**27 + 1  # Dekker's (1971): halves of a float64


def wide(x: Tensor) -> Tensor:
    """float64 or complex128, as it lies in memory: what Gramians are formed in."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64).resolve_conj().resolve_neg()


def one_minus_product(a: Tensor, b: Tensor) -> Tensor:
    """1 − a b* in float64, right to a few roundings of itself, with the plain formula's derivatives."""
    plain = 1 - a * b.conj_physical()
    with torch.no_grad():
        exact = compensated(a.detach(), b.detach())
    return plain + (exact - plain.detach())


def compensated(a: Tensor, b: Tensor) -> Tensor:
    """1 − a b* from two-products and two-sums."""
    if not a.is_complex():
        return one_minus([two_product(a, b)])
    a, b = a.resolve_conj(), b.resolve_conj()
    real = one_minus([two_product(a.real, b.real), two_product(a.imag, b.imag)])
    (p, e), (q, f) = two_product(a.imag, b.real), two_product(a.real, b.imag)
    return torch.complex(real, (q - p) + (f - e))


def one_minus(products: list[tuple[Tensor, Tensor]]) -> Tensor:
    """1 − Σ (p + e)."""
    total, lost = torch.ones_like(products[0][0]), torch.zeros_like(products[0][0])
    for p, e in products:
        before = total
        total = before - p
        virtual = total - before
        lost = lost + ((before - (total - virtual)) - (p + virtual)) - e
    return total + lost


def two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """p + e = a b without rounding."""
    p = a * b
    (ah, al), (bh, bl) = halves(a), halves(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower bits."""
    c = SPLIT * x
    high = c - (c - x)
    return high, x - high


def kappa(Lambda: Tensor, horizon: int | None, given: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """κ and its derivative at z_ij = λ_i λ_j*: (..., n) -> two of (..., n, n), in float64.

    `given` is the dtype that the λ were given in: of float32 numbers float64 products lose nothing that counts.
    """
    left, right = Lambda.unsqueeze(-1), Lambda.unsqueeze(-2)
    if horizon is None:
        exact = given in (torch.float64, torch.complex128)
        value = 1 / (one_minus_product(left, right) if exact else 1 - left * right.conj_physical())
        return value, value * value
    z = left * right.conj_physical()
    value, slope = torch.ones_like(z), torch.zeros_like(z)
    power, power_slope = z, torch.ones_like(z)  # z^L and L z^(L−1)
    for odd in bits(horizon):
        value, slope = value * (1 + power), slope * (1 + power) + value * power_slope
        power, power_slope = power * power, 2 * power * power_slope
        if odd:
            value, slope = 1 + z * value, value + z * slope
            power, power_slope = z * power, power + z * power_slope
    return value, slope


def bits(horizon: int) -> list[bool]:
    """The binary digits below the first, from the top: 2L, and + 1 where the digit is 1, lead from 1 to the horizon."""
    digits = []
    while horizon > 1:  # the horizon of a compiled graph may be symbolic, which bin() does not take
        digits.append(horizon % 2 == 1)
        horizon = horizon // 2
    return digits[::-1]


def projectors(L_c: Tensor, L_o: Tensor, U: Tensor, sigma: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """T = L_c V Σ^-1/2 and W = L_o U Σ^-1/2, of as many columns as U and V have; those that rounding has the better
    of are 0."""
    root = torch.where(negligible(sigma), torch.inf, sigma).rsqrt()[..., : U.shape[-1]].unsqueeze(-2)
    return (L_c @ Vh.mH) * root, (L_o @ U) * root


def negligible(sigma: Tensor) -> Tensor:
    """σ ≤ n ε σ_1: their vectors hold rounding errors of the larger ones, and no gradient or projection needs them."""
    return sigma <= sigma.shape[-1] * torch.finfo(torch.float64).eps * sigma[..., :1]


def horizon_factor(Lambda: Tensor, B: Tensor, horizon: int) -> Tensor:
    """F (..., n, n) with F Fᴴ = Σ_{k<L} Λ^k BBᴴ Λ*^k, by doubling: F_2L = [F_L, Λ^L F_L], F_{L+1} = [B, Λ F_L].

    Any λ is served. The factors are compressed by QR, whose error is relative to each row.
    """
    n = Lambda.shape[-1]
    F, power = compress(B), Lambda
    for odd in bits(horizon):
        F = compress(torch.cat([F, power.unsqueeze(-1) * F], -1))
        power = power * power
        if odd:
            F = compress(torch.cat([B, Lambda.unsqueeze(-1) * F], -1))
            power = Lambda * power
    return once(
        torch.nn.functional.pad(F, (0, n - F.shape[-1])), "factors of a finite horizon cannot be differentiated twice"
    )


def compress(F: Tensor) -> Tensor:
    """At most n columns with the same F Fᴴ and, whatever its rank, the same first derivatives of it: F Q, Q fixed."""
    if F.shape[-1] <= F.shape[-2]:
        return F
    Q, R = torch.linalg.qr(F.detach().mH)
    return F @ Q if F.requires_grad else R.mT.conj_physical()
