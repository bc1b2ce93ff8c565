"""The operators as torch.library sees them: schema, shapes without data, autograd.

Systems come as Lambda (N, n), B (N, n, m), C (N, p, n) of one dtype. A horizon of 0 is an infinite one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.library import needs as needed
from kdkernels.library import operator
from kdkernels.ops.hankel import gradient, native

TWICE = "hankel_singular_values' accelerated backward cannot be differentiated again; use backend='reference' for that"
BATCHED = "hankel_singular_values takes no batches of gradients; use backend='reference' for that"
NO_GRADIENT = "gramian_factors has no accelerated backward; use backend='reference' for that"


@operator("kdkernels::hankel_singular_values", visible=slice(1))
def hankel_singular_values(
    Lambda: Tensor, B: Tensor, C: Tensor, horizon: int, vectors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """σ (N, n) and, with `vectors`, T and W (N, n, n) in float64, which backward needs; else they are None."""
    if not vectors:
        return native.values(Lambda, B, C, horizon or None), None, None  # type: ignore[return-value]
    sigma, T, W = native.balance(Lambda, B, C, horizon or None)
    return sigma.to(B.real.dtype), T, W


@hankel_singular_values.register_fake
def _(Lambda: Tensor, B: Tensor, C: Tensor, horizon: int, vectors: bool) -> tuple[Tensor, Tensor, Tensor]:
    N, n = Lambda.shape
    sigma = B.new_empty(N, n, dtype=B.real.dtype)
    if not vectors:
        return sigma, None, None  # type: ignore[return-value]
    dtype = torch.complex128 if B.is_complex() else torch.float64
    return sigma, B.new_empty(N, n, n, dtype=dtype), B.new_empty(N, n, n, dtype=dtype)


@operator("kdkernels::hankel_singular_values_backward")
def hankel_singular_values_backward(
    grad: Tensor, Lambda: Tensor, B: Tensor, C: Tensor, T: Tensor, W: Tensor, horizon: int, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of Lambda, B and C; those not in `needs` are None."""
    found = gradient.backward(grad, Lambda, B, C, T, W, horizon or None, needs)
    return [None if x is None else x.contiguous() for x in found]  # type: ignore[misc]


@hankel_singular_values_backward.register_fake
def _(
    grad: Tensor, Lambda: Tensor, B: Tensor, C: Tensor, T: Tensor, W: Tensor, horizon: int, needs: Sequence[bool]
) -> list[Tensor]:
    return [x.new_empty(*x.shape) if need else None for x, need in zip((Lambda, B, C), needs, strict=True)]  # type: ignore[misc]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    Lambda, B, C, ctx.horizon, ctx.vectors = inputs
    ctx.save_for_backward(Lambda, B, C, *output[1:])
    ctx.set_materialize_grads(False)  # those of T and W would be n × n zeros


def _differentiate(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 5
    if not torch._C._has_storage(grad):
        raise RuntimeError(BATCHED)
    if not ctx.vectors:
        raise RuntimeError("kdkernels::hankel_singular_values has a gradient only with vectors=True")
    needs = [bool(need) for need in needed(ctx)[:3]]
    found = hankel_singular_values_backward(grad, *ctx.saved_tensors, ctx.horizon, needs)
    return *(x if need else None for x, need in zip(found, needs, strict=True)), None, None


hankel_singular_values.register_autograd(_differentiate, setup_context=_save)


@operator("kdkernels::gramian_factors")
def gramian_factors(Lambda: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_c and L_o (N, n, n), and the residuals of their traces (N, n + 1)."""
    return native.gramian_factors(Lambda, B, C)


@gramian_factors.register_fake
def _(Lambda: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, n = Lambda.shape
    L_c, L_o = (B.new_empty(N, n, n) for _ in range(2))
    residual_c, residual_o = (B.new_empty(N, n + 1, dtype=B.real.dtype) for _ in range(2))
    return L_c, L_o, residual_c, residual_o


def _refuse(message: str) -> Any:
    def raising(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        raise RuntimeError(message)

    return raising


hankel_singular_values_backward.register_autograd(_refuse(TWICE))
gramian_factors.register_autograd(_refuse(NO_GRADIENT))
