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

import torch
from torch import Tensor

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
    losses = student.new_empty(student.shape[0], dtype=accumulation_dtype(*operands))
    _implementation(backend).losses(operands, weights, metric, method, losses)
    return losses


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
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]
    ctx.grads = [g.detach() if need else g for g, need in zip(output[1:], inputs[9], strict=True)]  # else a cycle


def _scale_gradients(ctx: Any, grad_total: Tensor | None, *grads_of_gradients: Tensor | None) -> tuple[Any, ...]:
    if any(g is not None for g in grads_of_gradients):
        raise RuntimeError(TWICE)
    if grad_total is None:
        return (None,) * 12
    needs = ctx.options[2]
    grads, ctx.grads = ctx.grads, None  # handed out once: whoever gets them may keep and change them
    if grads is None or torch.is_grad_enabled():
        # A graph that was kept, or a first derivative that will itself be differentiated: then TWICE shall be raised.
        _, *grads = projection_alignment.whole(*ctx.saved_tensors, *ctx.options)
        grads = [g * grad_total if need else g for g, need in zip(grads, needs, strict=True)]
    elif not torch._C._has_storage(grad_total):  # a batch of gradients
        grads = [g * grad_total if need else g for g, need in zip(grads, needs, strict=True)]
    elif not _is_one(grad_total):
        grads = [g.mul_(grad_total) if need else g for g, need in zip(grads, needs, strict=True)]
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None, None


def _is_one(x: Tensor) -> bool:
    """Whether a scalar on the CPU is 1, as in `loss.backward()`: one pass over the gradients less.

    A tensor that only stands for one (while tracing) or lives on a device is not asked.
    """
    return type(x) is Tensor and x.device.type == "cpu" and x.item() == 1


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.metric, ctx.method, ctx.backend = inputs[7:]


def _weigh_points(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
    *operands, weights = ctx.saved_tensors
    weights = grad_losses if weights is None else torch.where(weights != 0, grad_losses * weights, 0)
    needs = [bool(need) for need in needed(ctx)[:6]]
    _, *grads = projection_alignment.whole(*operands, weights, ctx.metric, ctx.method, needs, ctx.backend, 1)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None


projection_alignment.register_autograd(_scale_gradients, setup_context=_save_gradients)
projection_alignment_points.register_autograd(_weigh_points, setup_context=_save_inputs)
