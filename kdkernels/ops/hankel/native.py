"""Gramian factors and Hankel singular values in C++; above a crossover their decomposition is torch.linalg's.

The kernels are in csrc/cpu/hankel.cpp and csrc/cuda/hankel.cu, their formulas in csrc/include/kdkernels/hankel.h.
"""

import torch
from torch import Tensor

from kdkernels import _native
from kdkernels.contract import readable
from kdkernels.ops.hankel.kernel import horizon_factor, negligible, projectors, wide
from kdkernels.ops.svd import native
from kdkernels.ops.svd.native import adjoint

LARGEST = 100  # orders up to here have their decomposition here: slower than LAPACK from about 80 on, but every σ right


def gramian_factors(Lambda: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, n), (N, n, m), (N, p, n) -> L_c, L_o (N, n, n) and the residuals of their traces (N, n + 1)."""
    N, n = Lambda.shape
    L_c, L_o = (B.new_empty(N, n, n) for _ in range(2))
    room = B.new_empty if n else B.new_zeros  # without states nothing is left, and nothing runs
    residual_c, residual_o = (room(N, n + 1, dtype=B.dtype.to_real()) for _ in range(2))
    run(Lambda, B, C, factor_c=L_c, factor_o=L_o, residual_c=residual_c, residual_o=residual_o)
    return L_c, L_o, residual_c, residual_o


def values(Lambda: Tensor, B: Tensor, C: Tensor, horizon: int | None) -> Tensor:
    """σ (N, n), computed in the dtype of the systems up to the crossover, in float64 above."""
    N, n = Lambda.shape
    if n <= LARGEST and horizon is None:
        sigma = B.new_empty(N, n, dtype=B.dtype.to_real())
        run(Lambda, B, C, values=sigma)
        return sigma
    L_c, L_o = wide_factors(Lambda, B, C, horizon)
    return native.svd(L_o.mH @ L_c, vectors=False)[1].to(B.real.dtype)


def balance(Lambda: Tensor, B: Tensor, C: Tensor, horizon: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """σ (N, n), T and W (N, n, n), in float64 whatever the dtype of the systems: T and W of a small σ need it."""
    N, n = Lambda.shape
    if n <= LARGEST and horizon is None:
        Lambda, B, C = map(wide, (Lambda, B, C))
        sigma, T, W = Lambda.new_empty(N, n, dtype=torch.float64), B.new_empty(N, n, n), B.new_empty(N, n, n)
        run(Lambda, B, C, values=sigma, T=T, W=W)
        lost = negligible(sigma).unsqueeze(-2)
        return sigma, T.masked_fill_(lost, 0), W.masked_fill_(lost, 0)
    L_c, L_o = wide_factors(Lambda, B, C, horizon)
    U, sigma, Vh = native.svd(L_o.mH @ L_c, vectors=True)
    assert U is not None and Vh is not None
    return sigma, *projectors(L_c, L_o, U, sigma, Vh)


def wide_factors(Lambda: Tensor, B: Tensor, C: Tensor, horizon: int | None) -> tuple[Tensor, Tensor]:
    """L_c and L_o in float64."""
    Lambda, B, C = map(wide, (Lambda, B, C))
    if horizon is not None:
        return horizon_factor(Lambda, B, horizon), horizon_factor(Lambda.conj_physical(), adjoint(C), horizon)
    L_c, L_o = (B.new_empty(*Lambda.shape, Lambda.shape[-1]) for _ in range(2))
    run(Lambda, B, C, factor_c=L_c, factor_o=L_o)
    return L_c, L_o


ROOMS = ("factor_c", "factor_o", "residual_c", "residual_o", "values", "T", "W")


def run(Lambda: Tensor, B: Tensor, C: Tensor, **rooms: Tensor) -> None:
    """Fill the rooms that are given."""
    N, n, _ = B.shape
    if not N or not n:
        return
    operands = [readable(x) for x in (Lambda, B, C)]  # alive until the call is over
    arguments = (*operands, *(rooms.get(name) for name in ROOMS))
    if B.is_cuda:
        _native.launch("cuda_hankel", B.device, *arguments)
    else:
        _native.module().hankel(*arguments, torch.get_num_threads())
