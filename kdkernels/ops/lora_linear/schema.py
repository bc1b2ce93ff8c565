"""The operator as torch.library sees it: schema, shapes without data, autograd.

One call serves K siblings, layers that share the input; a single layer is K = 1. `call.py` says how it is packed.
Backward needs the input, the projected points S = x̂ Aᵀ (N, r) and the states of the masks, nothing else of the size of
an activation.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kdkernels.library import needs, operator
from kdkernels.ops.lora_linear.call import NUMBERS, TENSORS, by_layer, gradient_room, room

BATCHED = "lora_linear's accelerated backward takes no batches of gradients; use backend='reference' for that"
TWICE = "lora_linear's accelerated backward cannot be differentiated again; use backend='reference' for that"
MOST_POINTS = 2**32  # rows are 32-bit words of the masks' counters

Tensors = Sequence[Tensor | None]


@operator("kdkernels::lora_linear", visible=lambda tensors, numbers, *_: slice(len(numbers) // NUMBERS))
def lora_linear(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], states: Tensor | None, backend: str
) -> list[Tensor]:
    """Y_k (N, d_out) of each layer, then S_k (N, r). `states` is (K, 2) int64, or None where nothing is dropped."""
    input = tensors[0]
    assert input is not None
    if input.shape[0] >= MOST_POINTS:
        raise ValueError(f"input has {input.shape[0]} points, but must have fewer than 2**32")
    return _implementation(backend).forward(tensors, numbers, states)


@lora_linear.register_fake
def _(tensors: Sequence[Tensor | None], numbers: Sequence[float], states: Tensor | None, backend: str) -> list[Tensor]:
    return room(tensors)


@operator("kdkernels::lora_linear_backward")
def lora_linear_backward(
    grad_outputs: Sequence[Tensor],
    projected: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    states: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of `tensors`, contiguous whatever their strides; those not in `needs` are None."""
    return _implementation(backend).backward(tensors, numbers, states, projected, grad_outputs, needs)


@lora_linear_backward.register_fake
def _(
    grad_outputs: Sequence[Tensor],
    projected: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    states: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    return gradient_room(tensors, needs)  # type: ignore[return-value]


@cache
def _implementation(backend: str) -> Any:
    """`native` or `triton`: imported when first used, so that importing kdkernels imports neither."""
    return import_module(f"kdkernels.ops.lora_linear.{backend}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Only what the wanted gradients are made from, where it is known which they are."""
    tensors, ctx.numbers, states, ctx.backend = inputs
    ctx.count = len(tensors)
    flags = getattr(ctx, "needs", None)
    kept, ctx.layouts = tensors, {}
    if flags is not None:
        read, unread = _read_by_backward(tuple(flags[0]))
        kept = [x if one else None for x, one in zip(tensors, read, strict=True)]
        ctx.layouts = {i: (x.shape, x.dtype, x.device) for i in unread if (x := tensors[i]) is not None}
    ctx.save_for_backward(*kept, *output[len(output) // 2 :], states)
    ctx.set_materialize_grads(False)


@cache
def _read_by_backward(needs: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[int, ...]]:
    """Whether backward reads each tensor for the gradients in `needs`, and the places of those it wants the shape of.

    It never reads a bias, and wants its shape only for its gradient.
    """
    dX, layers = needs[0], by_layer(needs)
    read = [any(dW or dA for dW, dA, *_ in layers)]
    for _, dA, *_ in layers:
        read += (dX, dX or dA, dX or dA, False)  # A, of which S is made, so that a second derivative finds it
    is_bias = [i > 0 and i % TENSORS == 0 for i in range(len(read))]
    unread = (i for i, one in enumerate(read) if not one and (needs[i] or not is_bias[i]))
    return tuple(read), tuple(unread)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """A layer whose output is not used has no gradient."""
    saved = ctx.saved_tensors
    tensors, projected, states = list(saved[: ctx.count]), saved[ctx.count : -1], saved[-1]
    grads = grads[: len(projected)]
    if any(g is not None and not torch._C._has_storage(g) for g in grads):
        raise RuntimeError(BATCHED)
    for i, (shape, dtype, device) in ctx.layouts.items():  # in the place of what is not read stands its shape alone
        tensors[i] = torch.empty((), dtype=dtype, device=device).expand(shape)
    wanted, numbers = needs(ctx)[0], ctx.numbers
    used = [k for k, g in enumerate(grads) if g is not None]
    if not used:
        return None, None, None, None
    if torch.is_grad_enabled() and 0 in ctx.layouts and wanted[0]:
        raise RuntimeError(TWICE)  # lora_B's gradient depends on an input that was not kept
    arriving = [g for g in grads if g is not None]
    places: Sequence[int] = range(ctx.count)
    if len(used) < len(grads):
        places = [0, *(1 + TENSORS * k + i for k in used for i in range(TENSORS))]
        tensors, wanted = [tensors[i] for i in places], [wanted[i] for i in places]
        projected = [projected[k] for k in used]
        states = None if states is None else torch.stack([states[k] for k in used])
        numbers = [numbers[NUMBERS * k + i] for k in used for i in range(NUMBERS)]
    # nothing but what arrives can be watched here, unless this is to be differentiated again
    run = lora_linear_backward.route([*arriving, *tensors] if torch.is_grad_enabled() else arriving)
    found = run(arriving, list(projected), tensors, numbers, states, list(wanted), ctx.backend)
    result: list[Tensor | None] = [None] * ctx.count
    for place, grad, need in zip(places, found, wanted, strict=True):
        if need:
            result[place] = grad
    return result, None, None, None


lora_linear.register_autograd(_differentiate, setup_context=_save)


def _refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(TWICE)


lora_linear_backward.register_autograd(_refuse)
