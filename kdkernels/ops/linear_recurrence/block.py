"""What surrounds the recurrence in a residual block of few features: its norm, and all that is behind the recurrence.

A row of 8 numbers fills no vector, and PyTorch's kernels take such rows one by one: they took a third of the time of a
training step whose states were few. Here rows lie across the lanes, and what is behind the recurrence is one pass,
of which backward keeps y and u and makes the rest again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.contract import without_autocast
from kdkernels.library import needs as needed
from kdkernels.library import operator
from kdkernels.ops.linear_recurrence import native
from kdkernels.ops.linear_recurrence.schema import BATCHED

MOST = 32  # features, of which these kernels were faster than PyTorch's


def composed_norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `norm`, in plain PyTorch."""
    return F.layer_norm(input, weight.shape, weight, bias, eps)


def composed_mix(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    D: Tensor,
    value: Tensor,
    value_bias: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    inner: Tensor | None,
    outer: Tensor | None,
) -> Tensor:
    """As `mix`, in plain PyTorch."""
    z = _times(F.gelu(torch.addcmul(y, D, u)), inner)
    return x + _times(F.linear(z, value, value_bias) * F.linear(z, gate, gate_bias).sigmoid(), outer)


def _times(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


@operator("kdkernels::narrow_norm")
def norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Rows of (..., H) of mean 0 and variance 1, times the weight (H), plus the bias (H)."""
    return native.norm(input, weight, bias, eps)


@norm.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return input.new_empty(input.shape)


@operator("kdkernels::narrow_norm_backward")
def norm_backward(grad: Tensor, input: Tensor, weight: Tensor, eps: float, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients of the input, the weight and the bias; those not in `needs` are None."""
    return native.norm_backward(grad, input, weight, eps, needs)  # type: ignore[return-value]


@norm_backward.register_fake
def _(grad: Tensor, input: Tensor, weight: Tensor, eps: float, needs: Sequence[bool]) -> list[Tensor]:
    return native.rooms((input, weight, weight), needs)  # type: ignore[return-value]


@operator("kdkernels::gated_mix")
def mix(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    D: Tensor,
    value: Tensor,
    value_bias: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    inner: Tensor | None,
    outer: Tensor | None,
) -> Tensor:
    """x + m₂ ⊙ (V z + v) ⊙ σ(G z + g) with z = m₁ ⊙ gelu(y + D ⊙ u), of x, y and u (N, T, H).

    `value` is V (H, H), `gate` G (H, H), their biases and D (H); `inner` is m₁, `outer` m₂ (N, 1, H), which have no
    gradients; None is 1.
    """
    return native.mix(x, (y, u, D, value, value_bias, gate, gate_bias), inner, outer)


@mix.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@operator("kdkernels::gated_mix_backward")
def mix_backward(
    grad: Tensor,
    y: Tensor,
    u: Tensor,
    D: Tensor,
    value: Tensor,
    value_bias: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    inner: Tensor | None,
    outer: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of y, u, D, V, v, G and g; those not in `needs` are None. That of x is `grad`."""
    tensors = (y, u, D, value, value_bias, gate, gate_bias)
    return native.mix_backward(grad, tensors, inner, outer, needs)  # type: ignore[return-value]


@mix_backward.register_fake
def _(grad: Tensor, *others: Any) -> list[Tensor]:
    return native.rooms(others[:7], others[-1])  # type: ignore[return-value]


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_norm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = [bool(need) for need in needed(ctx)[:3]]
    input, weight, bias = ctx.saved_tensors
    if again := _again(grad):
        with again:
            return *_gradients(partial(composed_norm, eps=ctx.eps), (input, weight, bias), grad, wanted), None
    found = norm_backward(grad, input, weight, ctx.eps, wanted)
    return *_picked(found, wanted), None


def _save_mix(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_mix(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_x, *rest = needed(ctx)[:8]
    wanted = [bool(need) for need in rest]
    *tensors, inner, outer = ctx.saved_tensors
    own = grad if of_x else None
    if not any(wanted):
        return own, *[None] * 9
    if again := _again(grad):
        with again:
            zero = torch.zeros_like(grad)
            found = _gradients(partial(composed_mix, zero, inner=inner, outer=outer), tensors, grad, wanted)
            return own, *found, None, None
    found = mix_backward(grad, *tensors, inner, outer, wanted)
    return own, *_picked(found, wanted), None, None


def _again(grad: Tensor) -> Any:
    """A context for gradients that are to be differentiated again; None where they are not."""
    if not torch._C._has_storage(grad):
        raise RuntimeError(BATCHED)
    if not torch.is_grad_enabled():
        return None
    return without_autocast(grad)  # which is not what forward was under


def _gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """By operations that can be differentiated again."""
    own = [x.view_as(x) for x in tensors]  # y is made of u: what reaches u by way of y is not this function's
    leaves = [x for x, need in zip(own, wanted, strict=True) if need]
    parts = iter(torch.autograd.grad(function(*own), leaves, grad, create_graph=True))
    return [next(parts) if need else None for need in wanted]


def _picked(found: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [x if need else None for x, need in zip(found, wanted, strict=True)]


norm.register_autograd(_differentiate_norm, setup_context=_save_norm)
mix.register_autograd(_differentiate_mix, setup_context=_save_mix)


def _refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("a block's accelerated backward is differentiated by composing, not by itself")


norm_backward.register_autograd(_refuse)
mix_backward.register_autograd(_refuse)
