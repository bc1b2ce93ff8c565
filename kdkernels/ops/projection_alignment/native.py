"""Projection alignment in C++ on the CPU: turns tensors into views, and keeps the Gram matrices of frozen projections.

The kernels are in csrc/cpu/projection_alignment.cpp, their formulas in csrc/include/kdkernels/projection_alignment.h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import _native
from kdkernels.ops.projection_alignment import method as methods
from kdkernels.ops.projection_alignment.frozen import Derived

Operands = Sequence[Tensor | None]

# Below this smallest squared pivot, relative to the diagonal, of the Cholesky factor of [W_s W_t]ᵀ[W_s W_t], rounding
# in the product could show in the loss, and the direct method runs. (Points that nearly coincide in the shared space
# need nearly dependent projections, so they never reach the Gram method.) mse is held to more: it has no norm to be
# compared with.
WELL_CONDITIONED = {
    (torch.float32, True): 1e-2,
    (torch.float32, False): 1e-4,
    (torch.float64, True): 1e-7,
    (torch.float64, False): 1e-9,
}  # by accumulation dtype and whether the metric is mse


def _fingerprint(x: Tensor) -> int:
    x = x if x.dim() < 2 or x.stride(-1) == 1 else x.contiguous()
    rows = x if x.dim() == 2 else x.contiguous()[None]  # a bias is one row
    return _native.module().fingerprint(rows, torch.get_num_threads())


derived = Derived(_fingerprint)


def loss_and_gradients(
    operands: Operands,
    weights: Tensor | None,
    metric: str,
    method: str,
    divisor: int,
    total: Tensor,
    grads: Sequence[Tensor | None],
) -> None:
    """Fill `total` and each gradient that has room (see `schema.projection_alignment`)."""
    _run(operands, grads, weights, metric, method, divisor, total=total, losses=None)


def losses(operands: Operands, weights: Tensor | None, metric: str, method: str, losses: Tensor) -> None:
    """Fill `losses` (N,) with weights · loss."""
    _run(operands, [None] * 6, weights, metric, method, 1, total=None, losses=losses)


def _run(
    operands: Operands,
    grads: Sequence[Tensor | None],
    weights: Tensor | None,
    metric: str,
    method: str,
    divisor: int,
    total: Tensor | None,
    losses: Tensor | None,
) -> None:
    accumulate = (losses if total is None else total).dtype  # type: ignore[union-attr]
    if method != "direct":
        method = methods.choose(method, methods.sizes(operands, [g is not None for g in grads], "native", metric))[0]
    arguments = (weights, divisor, losses, total, metric, accumulate)
    if method == "gram" and _run_gram(operands, grads, *arguments):
        return
    _call(operands, grads, *arguments)


def _run_gram(
    operands: Operands,
    grads: Sequence[Tensor | None],
    weights: Tensor | None,
    divisor: int,
    losses: Tensor | None,
    total: Tensor | None,
    metric: str,
    accumulate: torch.dtype,
) -> bool:
    """False when the projections are too ill-conditioned for it."""
    augmented, augmented_grads = _biases_as_columns(operands, grads)
    factor, pivot = _factor(operands, augmented, accumulate)
    if pivot < WELL_CONDITIONED[accumulate, metric == "mse"]:
        return False
    steady = weights is None and grads[1] is None and methods.frozen(operands)
    known, room = _teacher_coordinates(operands, factor) if steady else ((), ())
    tails, heads = (*known, *room, None, None)[:2]
    _call(
        augmented,
        augmented_grads,
        weights,
        divisor,
        losses,
        total,
        metric,
        accumulate,
        factor=factor,
        teacher_tails=tails,
        tails_known=len(known) > 0,
        teacher_heads=heads,
        heads_known=len(known) > 1,
    )
    if room:
        derived.keep(operands[1:2], "teacher", (*known, *room), anchor=factor)
    _split_columns(operands, grads, augmented_grads)
    return True


def _factor(operands: Operands, augmented: Operands, accumulate: torch.dtype) -> tuple[Tensor, float]:
    """The Cholesky factor and its smallest pivot; from memory where the projections are frozen."""
    native = _native.module()
    kind = (accumulate, native.isa())
    frozen = methods.frozen(operands)
    found = derived.find(operands[2:], kind) if frozen else None
    if found is not None:
        (factor,), pivot = found
        return factor, pivot
    width = sum(w.shape[1] for w in augmented[2:4] if w is not None)
    factor = torch.empty(width, width, dtype=accumulate, device="cpu")
    pivot = native.projection_alignment_factor(augmented, factor, _name(accumulate), torch.get_num_threads())
    if frozen:
        derived.keep(operands[2:], kind, (factor,), pivot)
    return factor, pivot


def _teacher_coordinates(operands: Operands, factor: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What is known of the coordinates y_t of a teacher batch, and room for what is worth keeping next.

    First come the tails ‖y_t[d_s:]‖² (N,), kept when a batch is first seen; then the heads y_t[:d_s] (N, d_s), as
    large as the student, kept when it is seen again. Fresh batches thus cost no more than a number a point.
    """
    student, teacher = operands[:2]
    assert student is not None and teacher is not None
    found = derived.find((teacher,), "teacher", anchor=factor)
    if found is None:
        return (), (teacher.new_empty(teacher.shape[0], dtype=torch.float64),)
    known = found[0]
    if len(known) > 1:
        return known, ()
    width = student.shape[1] + (operands[4] is not None)  # a bias is one more column
    return known, (factor.new_empty(teacher.shape[0], width),)


def _biases_as_columns(
    operands: Operands, grads: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """A bias is one more input column fixed at 1; the gradients get room for it."""
    if operands[4] is None and operands[5] is None:
        return list(operands), list(grads)
    augmented, room = list(operands), list(grads)
    for side in (0, 1):
        x, weight, bias = operands[side], operands[2 + side], operands[4 + side]
        if x is None or weight is None or bias is None:
            continue
        augmented[side] = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        dtype = torch.promote_types(weight.dtype, bias.dtype)
        augmented[2 + side] = torch.cat([weight.to(dtype), bias[:, None].to(dtype)], dim=1)
        augmented[4 + side] = room[4 + side] = None
        if grads[side] is not None:
            room[side] = x.new_empty(x.shape[0], x.shape[1] + 1)
        if grads[2 + side] is not None or grads[4 + side] is not None:
            room[2 + side] = weight.new_empty(weight.shape[0], weight.shape[1] + 1, dtype=dtype)
    return augmented, room


def _split_columns(operands: Operands, grads: Sequence[Tensor | None], room: Sequence[Tensor | None]) -> None:
    for side in (0, 1):
        if operands[4 + side] is None:
            continue
        points, weight, bias = grads[side], grads[2 + side], grads[4 + side]
        if points is not None:
            points.copy_(room[side][:, :-1])  # type: ignore[index]
        if weight is not None:
            weight.copy_(room[2 + side][:, :-1])  # type: ignore[index]
        if bias is not None:
            bias.copy_(room[2 + side][:, -1])  # type: ignore[index]


def _call(
    operands: Operands,
    grads: Sequence[Tensor | None],
    weights: Tensor | None,
    divisor: int,
    losses: Tensor | None,
    total: Tensor | None,
    metric: str,
    accumulate: torch.dtype,
    **grams: object,
) -> None:
    _native.module().projection_alignment(
        operands,
        grads,
        weights,
        divisor,
        losses,
        total,
        metric,
        _name(accumulate),
        torch.get_num_threads(),
        **grams,
    )


def _name(dtype: torch.dtype) -> str:
    return "float64" if dtype is torch.float64 else "float32"
