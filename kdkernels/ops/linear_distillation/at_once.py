"""A small call by one step into C++: one teacher, no labels, all points in one block.

For few points and tokens the steps of `stream.run`, and what packs a call for them, take longer than the arithmetic.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import _native, losses
from kdkernels.gemm import vendor_multiplies
from kdkernels.library import watched
from kdkernels.ops.linear_distillation import schema
from kdkernels.ops.linear_distillation.call import Side, pack
from kdkernels.ops.linear_distillation.head import Head

MOST = 6 * 2**20  # multiply-adds, and logits: beyond, faster products are worth more than the steps cost


class AtOnce(NamedTuple):
    """What is decided of such a call."""

    options: tuple[str, str, float, float, float]  # divergence, mixture, temperature, beta, alpha
    student: tuple[float, float, float]  # scale, softcap, share
    teacher: tuple[float, float, float]
    points: int | None  # N, of states that are to be flattened
    divisor: int
    needs: tuple[bool, bool]  # whether states and weight need a gradient


def decide(
    student: Tensor, head: Head | None, teachers: Sequence[tuple[Any, Head | None]], options: tuple[Any, ...],
    leading: tuple[int, ...], dtype: torch.dtype,
) -> AtOnce | None:  # fmt: skip
    """Of a checked call on the CPU, without labels, weights, maps and autocast; None where it takes several steps."""
    divergence, temperature, beta, alpha, mixture, _, reduction, _ = options
    if len(teachers) > 1 or reduction == "none":
        return None
    ((teacher, other),) = teachers
    if head is None or other is None:
        return None
    V, widths = head.weight.shape[0], student.shape[-1] + teacher.shape[-1]
    tensors = student, head.weight, teacher, other.weight
    if any(x.dtype is not dtype for x in tensors) or other.weight.shape[0] != V:
        return None
    grad = torch.is_grad_enabled()
    trained_bias = head.bias is not None and grad and head.bias.requires_grad
    if trained_bias or head.lora_A is not None or other.lora_A is not None:
        return None
    N = prod(leading)
    if N * V * (widths + 2) >= MOST or vendor_multiplies(dtype, size=0) or watched((*tensors, head.bias, other.bias)):
        return None
    return AtOnce(
        (divergence, mixture, float(temperature), float(beta), float(alpha)), _numbers(head), _numbers(other),
        None if student.dim() == teacher.dim() == 2 else N, max(N, 1) if reduction == "mean" else 1,
        (grad and student.requires_grad, grad and head.weight.requires_grad),
    )  # fmt: skip


def loss(plan: AtOnce, student: Tensor, head: Head, teacher: Tensor, other: Head) -> Tensor:
    """The reduced loss."""
    if plan.points is not None:
        student, teacher = (x.reshape(plan.points, x.shape[-1]) for x in (student, teacher))
    # teachers are data: a graph of theirs is not kept
    data = (x.detach() if x is not None and x.requires_grad else x for x in (teacher, other.weight, other.bias))
    operands = student, head.weight, head.bias, *data
    if not any(plan.needs):
        return run(plan, operands)[0]
    return _Loss.apply(plan, operands, student, head.weight)


def run(plan: AtOnce, operands: tuple[Any, ...]) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and the gradients that are needed."""
    total = operands[0].new_empty(())
    grads = [x.new_empty(x.shape) if need else None for x, need in zip(operands[:2], plan.needs, strict=True)]
    _native.module().linear_distillation_at_once(
        plan.options, operands, plan.student, plan.teacher, plan.divisor, total, *grads, torch.get_num_threads()
    )
    return total, grads


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: AtOnce, operands: tuple[Any, ...], *trained: Tensor) -> Tensor:
        total, grads = run(plan, operands)
        ctx.plan = plan
        losses.save(ctx, *operands)
        losses.keep(ctx, grads, plan.needs)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None) -> Any:
        if grad_total is None:
            return (None,) * 4

        def again() -> list[Tensor]:
            return _by_steps(ctx.plan, ctx.saved_tensors)

        return None, None, *losses.scaled(ctx, grad_total, (), ctx.plan.needs, again, schema.TWICE)


def _by_steps(plan: AtOnce, operands: Sequence[Any]) -> list[Tensor]:
    """The gradients of states and weight, for a graph that is walked once more, or differentiated."""
    sides = [
        Side(x, W, bias, scale=scale, softcap=softcap, share=share, vocabulary=len(W))
        for (x, W, bias), (scale, softcap, share) in ((operands[:3], plan.student), (operands[3:], plan.teacher))
    ]
    tensors, numbers = pack(sides)
    divergence, mixture, *common = plan.options
    needs = [*plan.needs, False, False, False]
    found = schema.linear_distillation.whole(
        tensors, [*common, *numbers], None, None, None, divergence, mixture, needs, "native", plan.divisor
    )
    return found[1:3]


def _numbers(head: Head) -> tuple[float, float, float]:
    return float(head.scale), float(head.softcap or 0), 1.0
