"""`projection_alignment_loss`: the documented function, its checks and its choice of implementation."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import Contract, autocast_dtype, check_choice
from kdkernels.losses import as_weights, nonzero
from kdkernels.ops.projection_alignment import method as methods
from kdkernels.ops.projection_alignment import reference, schema
from kdkernels.plans import Plans, undisturbed

# student, teacher, student_proj, teacher_proj, student_bias, teacher_bias
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

OP = "projection_alignment_loss"
PLANS = Plans()
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
    operands: Operands = (student, teacher, student_proj, teacher_proj, student_bias, teacher_bias)
    plan, operands, weights = _prepare(operands, weights, metric, reduction, method, backend)
    if plan.backend.backend == "reference":
        losses = reference.weighted_losses(*operands, weights, metric=metric)
        if reduction == "none":
            return losses.reshape(plan.leading)
        return _divided(losses.sum() / plan.divisor, weights, plan)
    if reduction == "none":
        points = plan.run(*operands, weights, metric, plan.method, plan.backend.backend)
        return points.reshape(plan.leading)
    options = (metric, plan.method, list(plan.needs), plan.backend.backend, plan.divisor)
    return _divided(plan.run(*operands, weights, *options)[0], weights, plan)


class _Plan(NamedTuple):
    """What is decided of a call. The mean's division goes into the points, so that gradients need no second pass."""

    backend: backends.Implementation
    run: Callable[..., Any]  # of the operator, in the way that such tensors need
    method: str
    leading: tuple[int, ...]
    needs: tuple[bool, ...]
    cast: torch.dtype | None  # what autocast makes of a projected side
    divisor: int  # of every point
    weighted_mean: bool  # the weights are divided by their sum
    late: int  # of the total: float16 gradients would lose small numbers before a gradient scaler has seen them; or 0


def _prepare(
    operands: Operands, weights: Tensor | None, metric: str, reduction: str, method: str, backend: str
) -> tuple[_Plan, Operands, Tensor | None]:
    """The plan of a checked call, and its operands and weights with one leading dimension."""
    weights = as_weights(weights)
    cast = autocast_dtype(operands[0])

    def decide() -> _Plan:
        return _plan(operands, weights, metric, reduction, method, backend, cast)

    options = (metric, reduction, method, backend, backends.default(), cast, torch.is_grad_enabled())
    plan = PLANS.find((*operands, weights), options, decide)
    if cast is not None:
        operands = _cast(operands, cast)
    if len(plan.leading) != 1:
        s, t = operands[:2]
        N = prod(plan.leading)
        operands = (s.reshape(N, s.shape[-1]), t.reshape(N, t.shape[-1]), *operands[2:])
    if weights is not None:
        weights = weights.reshape(prod(plan.leading)).to(reference.accumulation_dtype(*operands))
        if plan.weighted_mean and not plan.late:
            weights = weights / nonzero(weights.sum())
    return plan, operands, weights


def _plan(
    operands: Operands,
    weights: Tensor | None,
    metric: str,
    reduction: str,
    method: str,
    backend: str,
    cast: torch.dtype | None,
) -> _Plan:
    """Raises unless everything fits."""
    check_choice("metric", metric, reference.METRICS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("method", method, methods.METHODS)
    for side in (0, 1):
        if operands[4 + side] is not None and operands[2 + side] is None:
            bias, proj = schema.NAMES[4 + side], schema.NAMES[2 + side]
            raise ValueError(f"{bias} was given, but {proj} was not: a bias goes with a projection")
    unprojected = {letter: "D" for letter, proj in zip(("d_s", "d_t"), operands[2:4], strict=True) if proj is None}
    sizes = CONTRACT.bind(dict(zip(schema.NAMES, operands, strict=True), weights=weights), same=unprojected)
    device = operands[0].device.type
    served = operands if cast is None else _cast(operands, cast)
    present = [x for x in served if x is not None]
    chosen = backends.choose(OP, backend, device, {x.dtype for x in present})
    if chosen.backend != "reference":
        backends.refuse_tangents(OP, present)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands)
    N, mean = prod(sizes["..."]), reduction == "mean"
    late = mean and any(x.dtype is torch.float16 for x in present)
    if chosen.backend == "native" and reduction != "none" and undisturbed():
        flat = (torch.empty(N, served[0].shape[-1], device="meta"), *served[1:])
        method = methods.choose(method, methods.sizes(flat, needs, "native", metric))[0]
    operator = schema.projection_alignment_points if reduction == "none" else schema.projection_alignment
    return _Plan(
        backend=chosen,
        run=operator.route((*operands, weights)),
        method=method,
        leading=sizes["..."],
        needs=needs,
        cast=cast,
        divisor=max(N, 1) if mean and weights is None and not late else 1,
        weighted_mean=mean and weights is not None,
        late=max(N, 1) if late else 0,
    )


def _divided(total: Tensor, weights: Tensor | None, plan: _Plan) -> Tensor:
    if not plan.late:
        return total
    return total / (plan.late if weights is None else nonzero(weights.sum()))


def _cast(operands: Operands, dtype: torch.dtype) -> Operands:
    """Each projected side in this dtype."""
    projected = (operands[2] is not None, operands[3] is not None) * 3
    cast = (
        x.to(dtype) if x is not None and projects and x.dtype is not torch.float64 else x
        for x, projects in zip(operands, projected, strict=True)
    )
    return tuple(cast)  # type: ignore[return-value]


def _explain(**a: Any) -> backends.Explanation:
    given: Any = tuple(a[name] for name in schema.NAMES)
    plan, operands, _ = _prepare(given, a["weights"], a["metric"], a["reduction"], a["method"], a["backend"])
    sizes = methods.sizes(operands, plan.needs, plan.backend.backend, a["metric"])
    costs: tuple[methods.Cost, ...]
    if plan.backend.backend == "reference":
        method, costs = "direct", (methods.direct_cost(sizes),)
    else:
        method, costs = methods.choose(a["method"], sizes)
    dtypes = {x.dtype for x in operands if x is not None}
    reasons = backends.passed_over(OP, plan.backend, a["student"].device.type, dtypes)
    return backends.Explanation(OP, plan.backend.backend, method, reasons, costs)


backends.register_explainer(projection_alignment_loss, _explain)
