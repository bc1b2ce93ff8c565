"""The operators as torch.library sees them: schema, shapes without data, autograd.

Both work on flattened points. The reduced operator returns L = Σ_i weights_i · loss_i / divisor together with the
gradients that were asked for: they are made while a block's logits are there, and backward then only scales them. The
pointwise operator (reduction="none") returns the losses alone, and its backward is the reduced operator with the
incoming gradient as weights.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from kdkernels import losses
from kdkernels.contract import resolved
from kdkernels.library import needs as needed
from kdkernels.library import operator
from kdkernels.ops.linear_distillation.call import COMMON, TRAINED, Call, accumulation_dtype, unpack

TWICE = (
    "linear_distillation_loss computes its gradient in the forward pass and cannot be differentiated twice; "
    "use backend='reference' for second derivatives"
)
Tensors = Sequence[Tensor | None]


@operator("kdkernels::linear_distillation", visible=slice(1))
def linear_distillation(
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    excluded: Tensor | None,
    labels: Tensor | None,
    weights: Tensor | None,
    divergence: str,
    mixture: str,
    needs: Sequence[bool],
    backend: str,
    divisor: int,
) -> list[Tensor]:
    """Σ_i weights_i · loss_i / divisor and the student's gradients in the order of `Side`; others are None."""
    call = _read(tensors, numbers, excluded, labels, weights, divergence, mixture, divisor)
    total = call.student.states.new_empty((), dtype=call.dtype)
    grads = _gradient_room(tensors, needs)
    _implementation(backend).loss_and_gradients(call, total, grads)
    return [total, *grads]  # type: ignore[list-item]


@linear_distillation.register_fake
def _(*arguments: Any) -> list[Tensor]:
    tensors, needs = arguments[0], arguments[7]
    total = tensors[0].new_empty((), dtype=accumulation_dtype(*tensors))
    return [total, *_gradient_room(tensors, needs)]


@operator("kdkernels::linear_distillation_points")
def linear_distillation_points(
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    excluded: Tensor | None,
    labels: Tensor | None,
    weights: Tensor | None,
    divergence: str,
    mixture: str,
    backend: str,
) -> Tensor:
    """(N,): weights_i · loss_i."""
    call = _read(tensors, numbers, excluded, labels, weights, divergence, mixture, 1)
    found = call.student.states.new_empty(call.student.states.shape[0], dtype=call.dtype)
    _implementation(backend).losses(call, found)
    return found


@linear_distillation_points.register_fake
def _(*arguments: Any) -> Tensor:
    tensors = arguments[0]
    return tensors[0].new_empty(tensors[0].shape[0], dtype=accumulation_dtype(*tensors))


@cache
def _implementation(backend: str) -> Any:
    """`native` or `triton`: imported when first used, so that importing kdkernels imports neither."""
    return import_module(f"kdkernels.ops.linear_distillation.{backend}")


def _read(
    tensors: Tensors, numbers: Sequence[float], excluded: Tensor | None, labels: Tensor | None,
    weights: Tensor | None, divergence: str, mixture: str, divisor: int,
) -> Call:  # fmt: skip
    """What kernels read."""
    student, *teachers = unpack(tensors, numbers)
    if weights is not None:
        weights = resolved(weights)
    temperature, beta, alpha = numbers[:COMMON]
    return Call(
        student, teachers, excluded, labels, weights, divergence, mixture, temperature, beta, alpha, divisor,
        accumulation_dtype(*tensors),
    )  # fmt: skip


def _gradient_room(tensors: Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """Room for each gradient that is needed, contiguous whatever the strides of its operand."""
    pairs = zip(tensors[:TRAINED], needs, strict=True)
    return [x.new_empty(*x.shape) if x is not None and need else None for x, need in pairs]


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.numbers, *data = inputs[:5]
    ctx.options = inputs[5:]
    ctx.operands = len(tensors)
    losses.save(ctx, *tensors, *data)
    losses.keep(ctx, output[1:], inputs[7])


def _scale_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    grad_total, *others = grads
    if grad_total is None and all(g is None for g in others):
        return (None,) * 10

    def again() -> losses.Gradients:
        saved = ctx.saved_tensors
        return linear_distillation.whole(
            list(saved[: ctx.operands]), ctx.numbers, *saved[ctx.operands :], *ctx.options
        )[1:]

    found = losses.scaled(ctx, grad_total, others, ctx.options[2], again, TWICE)  # type: ignore[arg-type]
    return [*found, *[None] * (ctx.operands - TRAINED)], *(None,) * 9


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.numbers, *data = inputs[:5]
    ctx.divergence, ctx.mixture, ctx.backend = inputs[5:]
    ctx.operands = len(tensors)
    losses.save(ctx, *tensors, *data)


def _weigh_points(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, (excluded, labels, weights) = list(saved[: ctx.operands]), saved[ctx.operands :]
    weights = losses.point_weights(weights, grad_losses)
    needs = [bool(need) for need in needed(ctx)[0][:TRAINED]]
    _, *grads = linear_distillation.whole(
        tensors, ctx.numbers, excluded, labels, weights, ctx.divergence, ctx.mixture, needs, ctx.backend, 1
    )
    found = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return [*found, *[None] * (ctx.operands - TRAINED)], *(None,) * 7


linear_distillation.register_autograd(_scale_gradients, setup_context=_save_gradients)
linear_distillation_points.register_autograd(_weigh_points, setup_context=_save_inputs)
