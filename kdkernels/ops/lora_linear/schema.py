"""The operator as torch.library sees it: schema, shapes without data, autograd.

One call serves K siblings, layers that share the input; a single layer is K = 1. Backward needs the input, the
projected points S = x̂ Aᵀ (N, r) and the states of the masks, nothing else of the size of an activation.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kdkernels.library import watched
from kdkernels.ops.lora_linear.reference import accumulation_dtype

BATCHED = "lora_linear's accelerated backward takes no batches of gradients; use backend='reference' for that"
TWICE = "lora_linear's accelerated backward cannot be differentiated again; use backend='reference' for that"


@torch.library.custom_op("kdkernels::lora_linear", mutates_args=())
def lora_linear(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    """Y_k (N, d_out) for each sibling, then S_k (N, r).

    `input` is (N, d_in). An absent bias has no elements. `states` is (K, 2) int64, or empty where nothing is dropped.
    """
    return _forward(input, weights, biases, lora_A, lora_B, scalings, dropout_p, states, backend)


@lora_linear.register_fake
def _(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    outputs, projected = _room(input, weights, lora_A)
    return [*outputs, *projected]


@torch.library.custom_op("kdkernels::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    grad_outputs: Sequence[Tensor],
    input: Tensor,
    projected: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of the input, then of each weight, bias, lora_A and lora_B; those not in `needs` are empty."""
    return _backward(
        grad_outputs, input, projected, weights, biases, lora_A, lora_B, scalings, dropout_p, states, needs, backend
    )


@lora_linear_backward.register_fake
def _(
    grad_outputs: Sequence[Tensor],
    input: Tensor,
    projected: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    return _gradient_room(needs, input, weights, biases, lora_A, lora_B)


def _implementation(backend: str) -> Any:
    """`native` or `triton`: imported when first used, so that importing kdkernels imports neither."""
    return import_module(f"kdkernels.ops.lora_linear.{backend}")


def _forward(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    if input.shape[0] >= 2**32:  # rows are 32-bit words of the masks' counters
        raise ValueError(f"input has {input.shape[0]} points, but must have fewer than 2**32")
    outputs, projected = _room(input, weights, lora_A)
    present = [b if b.numel() else None for b in biases]
    (input,), *layers = _resolved([input], weights, present, lora_A, lora_B)
    _implementation(backend).forward(input, *layers, scalings, dropout_p, states, outputs, projected)
    return [*outputs, *projected]


def _backward(
    grad_outputs: Sequence[Tensor],
    input: Tensor,
    projected: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    grads = _gradient_room(needs, input, weights, biases, lora_A, lora_B)
    grad_outputs, (input,), weights, lora_A, lora_B = _resolved(grad_outputs, [input], weights, lora_A, lora_B)
    operands = (grad_outputs, input, projected, weights, lora_A, lora_B)
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    K = len(weights)
    by_kind = [wanted[1 + i * K : 1 + (i + 1) * K] for i in range(4)]
    _implementation(backend).backward(*operands, scalings, dropout_p, states, wanted[0], *by_kind)
    return grads


def _resolved(*groups: Sequence[Any]) -> list[list[Any]]:
    """Tensors as they lie in memory, which is what kernels read: torch keeps some signs, and some zeros, elsewhere."""

    def resolve(x: Tensor | None) -> Tensor | None:
        if x is not None and x._is_zerotensor():
            return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        return None if x is None else x.resolve_neg()

    return [[resolve(x) for x in group] for group in groups]


def _room(input: Tensor, weights: Sequence[Tensor], lora_A: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    N, wide = input.shape[0], accumulation_dtype(input.dtype)
    outputs = [input.new_empty(N, W.shape[0]) for W in weights]
    return outputs, [input.new_empty(N, A.shape[0], dtype=wide) for A in lora_A]


def _gradient_room(needs: Sequence[bool], input: Tensor, *operands: Sequence[Tensor]) -> list[Tensor]:
    """Room for each gradient, contiguous whatever the strides of its operand; empty where none is needed."""
    flat = [input, *(x for group in operands for x in group)]
    return [x.new_empty(x.shape if need else 0) for x, need in zip(flat, needs, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, weights, biases, lora_A, lora_B, scalings, dropout_p, states, backend = inputs
    K = len(weights)
    ctx.K = K
    ctx.save_for_backward(input, states, *output[K:], *weights, *biases, *lora_A, *lora_B)
    ctx.options = scalings, dropout_p, backend


def _differentiate(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    K = ctx.K
    input, states, *rest = ctx.saved_tensors
    projected, weights, biases, lora_A, lora_B = (rest[i * K : (i + 1) * K] for i in range(5))
    scalings, dropout_p, backend = ctx.options
    needs = [ctx.needs_input_grad[0], *(need for group in ctx.needs_input_grad[1:5] for need in group)]
    found = lora_linear_backward(
        list(grads[:K]), input, projected, weights, biases, lora_A, lora_B, scalings, dropout_p, states, needs, backend
    )
    wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
    by_kind = [wanted[1 + i * K : 1 + (i + 1) * K] for i in range(4)]
    return wanted[0], *by_kind, None, None, None, None


lora_linear.register_autograd(_differentiate, setup_context=_save)


def _refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(TWICE)


lora_linear_backward.register_autograd(_refuse)


class _Plain(torch.autograd.Function):
    """The same, without the machinery of torch.library, which costs more than a small layer does.

    It keeps only what the wanted gradients are made from (and each S), and a sibling whose output is not used has none.
    """

    @staticmethod
    def forward(ctx: Any, K: int, options: tuple[Any, ...], input: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        scalings, dropout_p, states, backend = options
        weights, biases, lora_A, lora_B = (flat[i * K : (i + 1) * K] for i in range(4))
        found = _forward(input, weights, biases, lora_A, lora_B, scalings, dropout_p, states, backend)
        operands = (input, *found[K:], *flat)
        kept = _read_by_backward(K, ctx.needs_input_grad[2:])
        ctx.K, ctx.options = K, options
        ctx.layouts = [(x.shape, x.dtype, x.device) for x in operands]
        ctx.save_for_backward(*(x if read else None for x, read in zip(operands, kept, strict=True)))
        ctx.set_materialize_grads(False)
        return tuple(found[:K])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        K = ctx.K
        if any(g is not None and not torch._C._has_storage(g) for g in grads):
            raise RuntimeError(BATCHED)
        used = [k for k in range(K) if grads[k] is not None]
        saved = [
            # in the place of what is not read stands its shape, without memory
            torch.empty((), dtype=dtype, device=device).expand(shape) if x is None else x
            for x, (shape, dtype, device) in zip(ctx.saved_tensors, ctx.layouts, strict=True)
        ]
        input = saved[0]
        projected, weights, biases, lora_A, lora_B = ([saved[1 + i * K + k] for k in used] for i in range(5))
        scalings, dropout_p, states, backend = ctx.options
        states = states[used] if len(states) else states
        options = ([scalings[k] for k in used], [dropout_p[k] for k in used], states)
        flags = ctx.needs_input_grad[2:]
        needs = [flags[0], *(flags[1 + i * K + k] for i in range(4) for k in used)]
        result: list[Tensor | None] = [None] * len(flags)
        if used:
            # the operator refuses to be differentiated again
            backward = lora_linear_backward if torch.is_grad_enabled() else _backward
            operands = (input, projected, weights, biases, lora_A, lora_B)
            found = backward([g for g in grads if g is not None], *operands, *options, needs, backend)
            places = [0, *(1 + i * K + k for i in range(4) for k in used)]
            for place, grad, need in zip(places, found, needs, strict=True):
                result[place] = grad if need else None
        return None, None, *result


def _read_by_backward(K: int, needs: Sequence[bool]) -> list[bool]:
    """Whether backward reads the input, each S, weight, bias, lora_A and lora_B, for the gradients in `needs`."""
    dX, (dW, _, dA, _) = needs[0], (needs[1 + i * K : 1 + (i + 1) * K] for i in range(4))
    return [any(dA) or any(dW), *[True] * K, *[dX] * K, *[False] * K, *[dX] * K, *(dX or a for a in dA)]


def call(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    backend: str,
) -> Sequence[Tensor]:
    """Y_k for each sibling: through torch.library where something must see the operator, else directly."""
    tensors = (input, *weights, *biases, *lora_A, *lora_B)
    if watched(tensors):
        operands = (input, weights, biases, lora_A, lora_B)
        return lora_linear(*operands, scalings, dropout_p, states, backend)[: len(weights)]
    return _Plain.apply(len(weights), (scalings, dropout_p, states, backend), *tensors)
