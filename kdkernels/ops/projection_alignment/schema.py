"""The operators as torch.library sees them: schema, shapes without data, autograd.

Both work on flattened points. The reduced operator returns L = Σ_i weights_i · loss_i / divisor together with the
gradients that were asked for: they cost least while a block's projections are in cache, and backward then only
scales them by the incoming scalar, on the device. The pointwise operator (reduction="none") returns the losses alone,
and its backward is the reduced operator with the incoming gradient as weights.
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
from kdkernels.ops.projection_alignment.reference import accumulation_dtype

NAMES = ("student", "teacher", "student_proj", "teacher_proj", "student_bias", "teacher_bias")
TWICE = (
    "projection_alignment_loss computes its gradient in the forward pass and cannot be differentiated twice; "
    "use backend='reference' for second derivatives"
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("kdkernels::projection_alignment", visible=slice(1))
def projection_alignment(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    weights: Tensor | None,
    metric: str,
    method: str,
    needs: list[bool],
    backend: str,
    divisor: int,
) -> Outputs:
    """Σ_i weights_i · loss_i / divisor and its gradients in the order of `NAMES`; those not in `needs` are None."""
    *operands, weights = _read(student, teacher, student_proj, teacher_proj, student_bias, teacher_bias, weights)
    total = student.new_empty((), dtype=accumulation_dtype(*operands))
    grads = _gradient_room(operands, needs)
    _implementation(backend).loss_and_gradients(operands, weights, metric, method, divisor, total, grads)
    return total, *grads  # type: ignore[return-value]


@projection_alignment.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    operands, needs = arguments[:6], arguments[9]
    total = operands[0].new_empty((), dtype=accumulation_dtype(*operands))
    return total, *_gradient_room(operands, needs)


@operator("kdkernels::projection_alignment_points")
def projection_alignment_points(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    weights: Tensor | None,
    metric: str,
    method: str,
    backend: str,
) -> Tensor:
    """(N,): weights_i · loss_i."""
    *operands, weights = _read(student, teacher, student_proj, teacher_proj, student_bias, teacher_bias, weights)
    found = student.new_empty(student.shape[0], dtype=accumulation_dtype(*operands))
    _implementation(backend).losses(operands, weights, metric, method, found)
    return found


@projection_alignment_points.register_fake
def _(*arguments: Any) -> Tensor:
    return arguments[0].new_empty(arguments[0].shape[0], dtype=accumulation_dtype(*arguments[:6]))


@cache
def _implementation(backend: str) -> Any:
    """`native` or `triton`: imported when first used, so that importing kdkernels imports neither."""
    return import_module(f"kdkernels.ops.projection_alignment.{backend}")


def _read(*tensors: Tensor | None) -> list[Any]:
    """What kernels read."""
    return [None if x is None else resolved(x) for x in tensors]


def _gradient_room(operands: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Room for each gradient that is needed, contiguous whatever the strides of its operand."""
    return [x.new_empty(*x.shape) if x is not None and need else None for x, need in zip(operands, needs, strict=True)]


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    losses.save(ctx, *inputs[:7])
    ctx.options = inputs[7:]
    losses.keep(ctx, output[1:], inputs[9])


def _scale_gradients(ctx: Any, grad_total: Tensor | None, *grads_of_gradients: Tensor | None) -> tuple[Any, ...]:
    if grad_total is None and all(g is None for g in grads_of_gradients):
        return (None,) * 12

    def again() -> losses.Gradients:
        return projection_alignment.whole(*ctx.saved_tensors, *ctx.options)[1:]

    return *losses.scaled(ctx, grad_total, grads_of_gradients, ctx.options[2], again, TWICE), *(None,) * 6  # type: ignore


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    losses.save(ctx, *inputs[:7])
    ctx.metric, ctx.method, ctx.backend = inputs[7:]


def _weigh_points(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
    *operands, weights = ctx.saved_tensors
    weights = losses.point_weights(weights, grad_losses)
    needs = [bool(need) for need in needed(ctx)[:6]]
    _, *grads = projection_alignment.whole(*operands, weights, ctx.metric, ctx.method, needs, ctx.backend, 1)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None


projection_alignment.register_autograd(_scale_gradients, setup_context=_save_gradients)
projection_alignment_points.register_autograd(_weigh_points, setup_context=_save_inputs)
