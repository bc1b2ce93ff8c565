"""`projection_alignment_loss`: the documented function, its checks and its choice of implementation."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import Contract, check_choice
from kdkernels.ops.projection_alignment import method as methods
from kdkernels.ops.projection_alignment import reference, schema

# student, teacher, student_proj, teacher_proj, student_bias, teacher_bias
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

OP = "projection_alignment_loss"
REDUCTIONS = ("mean", "sum", "none")
CONTRACT = Contract(
    student="... d_s",
    teacher="... d_t",
    student_proj="D d_s?",
    teacher_proj="D d_t?",
    student_bias="D?",
    teacher_bias="D?",
    weights="...?",
)


def projection_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None = None,
    teacher_proj: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    metric: str = "cosine",
    weights: Tensor | None = None,
    reduction: str = "mean",
    method: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Distance of student and teacher points after each was mapped into one shared space.

    With z_s = student @ student_projᵀ + student_bias and z_t likewise, the loss of a point is

    - `"cosine"`: 1 − cos(z_s, z_t), with norms clamped at 1e-8 as in `torch.nn.functional.cosine_similarity`;
    - `"mse"`: the mean over D of (z_s − z_t)²;
    - `"angular"`: acos(clamp(cos, −1 + 1e-7, 1 − 1e-7)), the angle of arXiv 2606.00771; its gradient is 0 where the
      clamp is active.

    Args:
        student: (..., d_s) hidden states.
        teacher: (..., d_t) hidden states, with the same leading dimensions.
        student_proj: (D, d_s) weight as in `torch.nn.Linear`, or None when the student already lives in D.
        teacher_proj: (D, d_t), or None when the teacher already lives in D.
        student_bias: (D,), only beside a projection.
        teacher_bias: (D,), only beside a projection.
        metric: `"cosine"`, `"mse"` or `"angular"`.
        weights: (...), of either sign, one per point; a mask may be boolean. A point of weight 0 does not count: what
            it holds, NaN included, reaches neither the loss nor a gradient. No gradient flows into weights.
        reduction: `"mean"` divides by the sum of the weights (the number of points without them; if nothing counts,
            the loss is 0), `"sum"` adds up, `"none"` returns weights · loss in the shape of the leading dimensions.
        method: `"direct"` projects and reduces block by block; `"gram"` eliminates D through [W_s W_t]ᵀ[W_s W_t] (it
            needs both projections, and runs direct where these are too ill-conditioned for it); `"auto"` takes the
            cheaper by FLOPs and bytes (`kdkernels.explain` shows them). The reference knows the definition alone.
        backend: `"auto"`, `"reference"`, `"native"` (CPU) or `"triton"` (GPU). One that was asked for by name and
            cannot serve raises.

    Any mix of float32, bfloat16 and float16 is computed with float32 accumulation and returns a float32 loss; any
    float64 argument but weights makes both float64. Gradients have their argument's dtype. The accelerated backends
    are differentiable once, backwards; the reference any way. Below its clamp a norm is a constant to their gradient
    too, where torch's `cosine_similarity`, and with it the reference, still differentiates it.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes, devices or options do not fit; the message names the argument.
    """
    call = _prepare(
        student, teacher, student_proj, teacher_proj, student_bias, teacher_bias, weights, metric, reduction, method,
        backend,
    )  # fmt: skip
    if call.backend.backend == "reference":
        losses = reference.weighted_losses(*call.operands, call.weights, metric=metric)
        if reduction == "none":
            return losses.reshape(call.leading)
        return losses.sum() / (call.divisor if call.late_divisor is None else call.late_divisor)
    if reduction == "none":
        points = schema.projection_alignment_points(*call.operands, call.weights, metric, method, call.backend.backend)
        return points.reshape(call.leading)
    total, *_ = schema.projection_alignment(
        *call.operands, call.weights, metric, method, call.needs, call.backend.backend, call.divisor
    )
    return total if call.late_divisor is None else total / call.late_divisor


@dataclass(frozen=True)
class _Call:
    """A checked call: flattened operands, and what will serve it."""

    operands: Operands
    weights: Tensor | None  # (N,)
    divisor: int  # of every point
    late_divisor: Tensor | int | None  # of the total
    leading: tuple[int, ...]
    needs: list[bool]
    backend: backends.Implementation


def _prepare(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    weights: Tensor | None,
    metric: str,
    reduction: str,
    method: str,
    backend: str,
) -> _Call:
    check_choice("metric", metric, reference.METRICS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("method", method, methods.METHODS)
    for side, bias, proj in (("student", student_bias, student_proj), ("teacher", teacher_bias, teacher_proj)):
        if bias is not None and proj is None:
            raise ValueError(f"{side}_bias was given, but {side}_proj was not: a bias goes with a projection")
    weights = _as_weights(weights)
    operands: Operands = (student, teacher, student_proj, teacher_proj, student_bias, teacher_bias)
    unprojected = {letter: "D" for letter, proj in (("d_s", student_proj), ("d_t", teacher_proj)) if proj is None}
    sizes = CONTRACT.bind(dict(zip(schema.NAMES, operands, strict=True), weights=weights), same=unprojected)
    operands = _autocast(operands)
    present = [x for x in operands if x is not None]
    chosen = backends.choose(OP, backend, student.device.type, {x.dtype for x in present})
    if chosen.backend != "reference":
        backends.refuse_tangents(OP, present)

    s, t, W_s, W_t, b_s, b_t = operands
    N = prod(sizes["..."])
    s, t = s.reshape(N, s.shape[-1]), t.reshape(N, t.shape[-1])
    if weights is not None:
        weights = weights.reshape(N).to(reference.accumulation_dtype(*operands))
    divisor, late_divisor = 1, None
    if reduction == "mean":
        # The mean's division goes into the points, so that gradients need no second pass; but float16 gradients would
        # lose small numbers before a gradient scaler has seen them.
        if any(x.dtype is torch.float16 for x in present):
            late_divisor = max(N, 1) if weights is None else _nonzero(weights.sum())
        elif weights is None:
            divisor = max(N, 1)
        else:
            weights = weights / _nonzero(weights.sum())
    return _Call(
        operands=(s, t, W_s, W_t, b_s, b_t),
        weights=weights,
        divisor=divisor,
        late_divisor=late_divisor,
        leading=sizes["..."],
        needs=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands],
        backend=chosen,
    )


def _as_weights(weights: Tensor | None) -> Tensor | None:
    """Masks may be boolean or integer; weights are data, not parameters."""
    if not isinstance(weights, Tensor):
        if weights is not None:
            raise TypeError(f"weights is {type(weights).__name__}, but must be a torch.Tensor")
        return None
    if weights.requires_grad:
        raise ValueError(
            "weights requires grad, but no gradient flows into weights: use reduction='none' and weigh the losses "
            "outside, or detach them"
        )
    if weights.is_complex():
        raise TypeError(f"weights has dtype {weights.dtype}, but must be real")
    return weights if weights.is_floating_point() else weights.to(torch.float32)


def _nonzero(total: Tensor) -> Tensor:
    """The sum of the weights, or 1 where nothing counts and the loss is 0 already."""
    return torch.where(total == 0, torch.ones_like(total), total)


def _autocast(operands: Operands) -> Operands:
    """Under autocast a projected side is cast as `torch.nn.functional.linear` would cast it."""
    device = operands[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    projected = (operands[2] is not None, operands[3] is not None) * 3
    cast = (
        x.to(dtype) if x is not None and projects and x.dtype is not torch.float64 else x
        for x, projects in zip(operands, projected, strict=True)
    )
    return tuple(cast)  # type: ignore[return-value]


def _explain(**a: Any) -> backends.Explanation:
    order = (*schema.NAMES, "weights", "metric", "reduction", "method", "backend")
    call = _prepare(*(a[name] for name in order))
    sizes = methods.sizes(call.operands, call.needs, call.backend.backend, a["metric"])
    dtypes = {x.dtype for x in call.operands if x is not None}
    costs: tuple[methods.Cost, ...]
    if call.backend.backend == "reference":
        method, costs = "direct", (methods.direct_cost(sizes),)
    else:
        method, costs = methods.choose(a["method"], sizes)
    reasons = backends.passed_over(OP, call.backend, a["student"].device.type, dtypes)
    return backends.Explanation(OP, call.backend.backend, method, reasons, costs)


backends.register_explainer(projection_alignment_loss, _explain)
