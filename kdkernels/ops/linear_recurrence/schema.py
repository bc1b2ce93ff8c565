"""The operator as torch.library sees it: schema, shapes without data, autograd.

Λ comes as (1, n) or (N, n), the input as (N, T, n), the initial state as (N, n) or None, all of one dtype.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kdkernels.library import needs, operator

BATCHED = "linear_recurrence's accelerated backward takes no batches of gradients; use backend='reference' for that"


@operator("kdkernels::linear_recurrence")
def linear_recurrence(
    Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool, backend: str
) -> Tensor:
    """h (N, T, n)."""
    return implementation(backend).forward(Lambda, input, initial_state, reverse)


@linear_recurrence.register_fake
def _(Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool, backend: str) -> Tensor:
    return input.new_empty(input.shape)


@operator("kdkernels::linear_recurrence_backward")
def linear_recurrence_backward(
    grad: Tensor,
    Lambda: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of Λ, the input and the initial state; those not in `needs` are None."""
    return implementation(backend).backward(grad, Lambda, states, initial_state, reverse, needs)


@linear_recurrence_backward.register_fake
def _(
    grad: Tensor,
    Lambda: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    N, _, n = states.shape
    rooms = (Lambda.shape, states.shape, (N, n))
    return [states.new_empty(room) if need else None for room, need in zip(rooms, needs, strict=True)]  # type: ignore[misc]


@cache
def implementation(backend: str) -> Any:
    """`native` or `triton`: imported when first used, so that importing kdkernels imports neither."""
    return import_module(f"kdkernels.ops.linear_recurrence.{backend}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    Lambda, _, initial_state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(Lambda, output, initial_state)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if not torch._C._has_storage(grad):
        raise RuntimeError(BATCHED)
    Lambda, states, initial_state = ctx.saved_tensors
    wanted = [bool(need) for need in needs(ctx)[:3]]
    if torch.is_grad_enabled():
        found = _composed(grad, Lambda, states, initial_state, ctx.reverse, wanted, ctx.backend)
    else:
        found = linear_recurrence_backward(grad, Lambda, states, initial_state, ctx.reverse, wanted, ctx.backend)
    return *(x if need else None for x, need in zip(found, wanted, strict=True)), None, None


def _composed(
    grad: Tensor,
    Lambda: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor | None]:
    """The same of operations that can be differentiated again."""
    conjugate = Lambda.conj().resolve_conj() if Lambda.is_complex() else Lambda
    g = linear_recurrence(conjugate, grad, None, not reverse, backend)
    found: list[Tensor | None] = [None, g, None]
    if not grad.shape[1]:
        return [torch.zeros_like(Lambda), g, None if initial_state is None else torch.zeros_like(initial_state)]
    later, earlier = (g[:, :-1], states[:, 1:]) if reverse else (g[:, 1:], states[:, :-1])
    first = g[:, -1] if reverse else g[:, 0]  # of the step that the initial state enters
    if needs[0]:
        total = (later * earlier.conj()).sum(1)  # (N, n)
        if initial_state is not None:
            total = total + first * initial_state.conj()
        found[0] = total.sum(0, keepdim=True) if len(Lambda) == 1 else total
    if needs[2]:
        found[2] = conjugate * first
    return found


linear_recurrence.register_autograd(_differentiate, setup_context=_save)


def _refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("linear_recurrence's accelerated backward is differentiated by composing, not by itself")


linear_recurrence_backward.register_autograd(_refuse)
