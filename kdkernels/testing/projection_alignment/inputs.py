"""Seeded inputs for projection alignment, of both signs, easy and hostile; and the three ways to run them.

`exact` is the reference in float64, `eager` what a user would write in the dtype of the inputs, `ours` the operator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdkernels import projection_alignment_loss
from kdkernels.ops.projection_alignment import schema
from kdkernels.ops.projection_alignment.reference import eager_losses, weighted_losses
from kdkernels.testing.compare import Outcome, incoming

SIDES = ("both", "student", "teacher", "neither")
REGIMES = ("random", "close", "parallel", "antiparallel", "zero")

Operands = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Inputs:
    """One call: operands in the order of `schema.NAMES`, options, and which gradients are wanted."""

    operands: Operands
    weights: Tensor | None
    needs: tuple[bool, ...]
    metric: str = "cosine"
    reduction: str = "mean"
    steps: int = 1  # calls on the same tensors; the last one is looked at (the first may leave something in a cache)

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> "Inputs":
        """The same numbers in another dtype or place."""
        weights = None if self.weights is None else self.weights.to(device or self.weights.device)
        moved = tuple(None if x is None else x.detach().to(device=device, dtype=dtype) for x in self.operands)
        return replace(self, operands=moved, weights=weights)


def make_inputs(
    N: int = 37,
    d_s: int = 11,
    d_t: int = 14,
    D: int = 60,  # well above d_s + d_t: WᵀW has a Cholesky factor
    *,
    sides: str = "both",
    bias: bool = True,
    regime: str = "random",
    weights: str | None = None,
    frozen: Sequence[str] = (),
    metric: str = "cosine",
    reduction: str = "mean",
    steps: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Seeded operands. `sides` are those with a projection; `frozen` names operands that need no gradient.

    Regimes: `close` has z_s ≈ z_t to 1e-4; `parallel` and `antiparallel` have cos within 1e-6 of ±1 at different
    lengths; `zero` has points whose projections vanish on either side and on both (which leaves no bias).
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    d_s = d_s if sides in ("both", "student") else D
    d_t = d_t if sides in ("both", "teacher") else D
    student, teacher = normal(N, d_s), normal(N, d_t)
    student_proj = normal(D, d_s) / d_s**0.5 if sides in ("both", "student") else None
    teacher_proj = normal(D, d_t) / d_t**0.5 if sides in ("both", "teacher") else None
    biased = bias and regime != "zero"
    student_bias = 0.3 * normal(D) if biased and student_proj is not None else None
    teacher_bias = 0.3 * normal(D) if biased and teacher_proj is not None else None
    if regime in ("close", "parallel", "antiparallel"):
        noise, scale = {"close": (1e-4, 1.0), "parallel": (9e-4, 1.7), "antiparallel": (9e-4, -1.7)}[regime]
        bring_together(student, teacher, student_proj, teacher_proj, student_bias, teacher_bias, noise, scale, draw)
    elif regime == "zero":
        student[: N // 3] = 0
        teacher[N // 4 : N // 2] = 0
    operands = (student, teacher, student_proj, teacher_proj, student_bias, teacher_bias)
    point_weights = make_weights(weights, student, teacher, draw)
    return Inputs(
        operands=tuple(None if x is None else x.to(device, dtype) for x in operands),
        weights=None if point_weights is None else point_weights.to(device, torch.float32),
        needs=tuple(x is not None and name not in frozen for name, x in zip(schema.NAMES, operands, strict=True)),
        metric=metric,
        reduction=reduction,
        steps=steps,
    )


def bring_together(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    noise: float,
    scale: float,
    draw: torch.Generator,
) -> None:
    """Overwrite the sides so that z_t = scale · (z_s + noise): where both are projected they share columns."""
    if student_proj is not None and teacher_proj is not None:
        k = min(student.shape[1], teacher.shape[1])
        teacher[:, :k] = student[:, :k]
        teacher_proj[:, :k] = student_proj[:, :k]
        for proj in (student_proj, teacher_proj):
            proj[:, k:] *= noise
    elif student_proj is not None:
        teacher.copy_(student @ student_proj.T + (0 if student_bias is None else student_bias))
    elif teacher_proj is not None:
        student.copy_(teacher @ teacher_proj.T + (0 if teacher_bias is None else teacher_bias))
        student /= scale
    else:
        teacher.copy_(student)
    if student_bias is not None and teacher_bias is not None:
        teacher_bias.copy_(student_bias * scale)
    if teacher_proj is None or student_proj is not None:
        teacher *= scale
    moved = teacher if teacher_proj is None or student_proj is not None else student
    moved += noise * moved.abs().mean() * torch.randn(moved.shape, generator=draw, dtype=torch.float64)


def make_weights(kind: str | None, student: Tensor, teacher: Tensor, draw: torch.Generator) -> Tensor | None:
    """Point weights: a mask, both signs, or both signs with NaN in the points that weigh nothing."""
    if kind is None:
        return None
    N = student.shape[0]
    weights = torch.randn(N, generator=draw, dtype=torch.float64) if kind != "mask" else torch.ones(N)
    weights[::3] = 0
    if kind != "mask":
        weights += 2.5 * (weights != 0)  # mostly positive, so that the mean does not divide by next to nothing
        weights[1::6] *= -0.5
    if kind == "nan":
        student[::3] = torch.nan
        teacher[::6] = torch.nan
    return weights


def run(inputs: Inputs, loss: Callable[[Operands], Tensor]) -> Outcome:
    """`loss` of fresh leaves, and the wanted gradients of it times `INCOMING` (of both signs when pointwise)."""
    leaves = tuple(
        None if x is None else x.detach().requires_grad_(need)
        for x, need in zip(inputs.operands, inputs.needs, strict=True)
    )
    for _ in range(inputs.steps):
        value = loss(leaves)
    wanted = {name: x for name, x in zip(schema.NAMES, leaves, strict=True) if x is not None and x.requires_grad}
    if not wanted:
        return Outcome(value, {})
    grads = torch.autograd.grad(value, list(wanted.values()), incoming(value))
    return Outcome(value.detach(), dict(zip(wanted, grads, strict=True)))


def reduce(losses: Tensor, inputs: Inputs) -> Tensor:
    """The weighted losses as they are, their sum, or their mean."""
    return losses if inputs.reduction == "none" else losses.sum() / divisor(inputs, losses.dtype)


def divisor(inputs: Inputs, dtype: torch.dtype) -> Tensor | int:
    """What a sum is divided by: the sum of the weights or the number of points, 1 where nothing counts."""
    if inputs.reduction != "mean":
        return 1
    if inputs.weights is None:
        return max(len(inputs.operands[0]), 1)  # type: ignore[arg-type]
    total = inputs.weights.to(dtype).sum()
    return torch.where(total == 0, torch.ones_like(total), total)


def exact(inputs: Inputs) -> Outcome:
    """The reference in float64."""
    wide = inputs.to(dtype=torch.float64)
    return run(wide, lambda x: reduce(weighted_losses(*x, wide.weights, metric=wide.metric), wide))  # type: ignore[arg-type, misc]


def eager_pointwise(inputs: Inputs, operands: Operands) -> Tensor:
    """Weighted losses as a user writes them: the points that count are picked, everything in the inputs' dtype."""
    if inputs.weights is None:
        return eager_losses(*operands, metric=inputs.metric)  # type: ignore[arg-type]
    counts = inputs.weights.nonzero()[:, 0]
    student, teacher, *rest = operands
    losses = eager_losses(student[counts], teacher[counts], *rest, metric=inputs.metric)  # type: ignore[index]
    weighted = losses * inputs.weights[counts].to(losses.dtype)
    return torch.zeros_like(inputs.weights, dtype=losses.dtype).index_put((counts,), weighted)


def eager(inputs: Inputs) -> Outcome:
    """Plain PyTorch in the dtype of the inputs."""
    return run(inputs, lambda x: reduce(eager_pointwise(inputs, x), inputs))


def ours(inputs: Inputs, backend: str = "auto", method: str = "auto") -> Outcome:
    """The public operator."""
    return run(
        inputs,
        lambda x: projection_alignment_loss(
            *x[:4],  # type: ignore[arg-type]
            student_bias=x[4],
            teacher_bias=x[5],
            metric=inputs.metric,
            weights=inputs.weights,
            reduction=inputs.reduction,
            method=method,
            backend=backend,
        ),
    )


def interpreted(inputs: Inputs, backend: str, method: str) -> Outcome:
    """The operator below dispatch: how Triton's interpreter, which dispatch does not know, is run on CPU tensors."""
    weights = None if inputs.weights is None else inputs.weights.float()

    def loss(x: Operands) -> Tensor:
        if inputs.reduction == "none":
            return schema.projection_alignment_points(*x, weights, inputs.metric, method, backend)
        total, *_ = schema.projection_alignment(*x, weights, inputs.metric, method, list(inputs.needs), backend, 1)
        return total / divisor(inputs, total.dtype)

    return run(inputs, loss)
