"""`linear_distillation_loss`: the documented function, its checks and its choice of implementation."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import autocast_dtype, check_choice, is_whole
from kdkernels.losses import as_weights, nonzero
from kdkernels.ops.linear_distillation import at_once, reference, schema, stream
from kdkernels.ops.linear_distillation import method as methods
from kdkernels.ops.linear_distillation.arguments import (
    Teacher,
    as_shares,
    as_teachers,
    check_labels,
    check_side,
    names,
    tensors_of,
)
from kdkernels.ops.linear_distillation.call import TRAINED, Call, Side, accumulation_dtype, pack
from kdkernels.ops.linear_distillation.head import SMALLEST, Head, as_head, check_range, side_of
from kdkernels.ops.linear_distillation.top_k import TopKTeacher
from kdkernels.ops.linear_distillation.vocabulary import Vocabularies, as_maps, common
from kdkernels.plans import Plans, undisturbed

OP = "linear_distillation_loss"
PLANS = Plans()
REDUCTIONS = ("mean", "sum", "none")
OPTIONS: dict[str, Any] = {  # in the order in which a plan reads them, and their defaults
    "divergence": "forward_kl", "temperature": 1.0, "beta": 0.5, "alpha": 1.0, "mixture": "arithmetic",
    "ignore_index": -100, "reduction": "mean", "backend": "auto",
}  # fmt: skip


def linear_distillation_loss(
    student: Tensor,
    student_head: Tensor | Head | None,
    teachers: Teacher | Sequence[Teacher],
    teacher_heads: Tensor | Head | Sequence[Tensor | Head | None] | None = None,
    *,
    labels: Tensor | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 1.0,
    teacher_weights: Sequence[float] | Tensor | None = None,
    mixture: str = "arithmetic",
    vocab_map: Vocabularies = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Soft targets of one teacher or several, from hidden states and heads: the logits are never all there.

    With logits y = student_headᵀ-products of the student and y_k of the teachers, q = softmax(y/T) and the target
    p = Σ π_k softmax(y_k/T), or softmax(Σ π_k y_k/T), the loss of a point is

        α T² D(p, q) + (1 − α) cross-entropy(y, label)

    where D is `"forward_kl"` KL(p ‖ q), `"reverse_kl"` KL(q ‖ p), `"jsd"` β KL(p ‖ m) + (1 − β) KL(q ‖ m) with
    m = β p + (1 − β) q, or `"tvd"` ½ Σ |p − q| (arXiv 1503.02531, 2306.13649).

    Args:
        student: (..., d_s) hidden states; without a head (..., V) logits.
        student_head: (V, d_s) as in `torch.nn.Linear`, a `Head` where there is a bias, an adapter, a scale or a
            softcap, or None.
        teachers: (..., d_t) hidden states, (..., V) logits, a `TopKTeacher`, or a list of any of these, one for each
            teacher. Teachers are data: no gradient flows into them or their heads, tied ones included.
        teacher_heads: of each teacher that is hidden states, (V, d_t) or a `Head`; None for the others.
        labels: (...) integers, tokens of the student's vocabulary. Points whose label is `ignore_index` do not count,
            for soft targets either. On a GPU, where nobody waits for an answer, any other label that is no token makes
            its point's loss NaN.
        divergence: D.
        temperature: T, above 0. D is multiplied by T², so that gradients keep their size.
        beta: β of the JSD, above 0 and below 1.
        alpha: α, from 0 to 1: the share of the soft targets. Below 1 it needs labels.
        teacher_weights: π, one number of at least 0 for each teacher, 1 in sum; equal shares when None. A teacher of
            weight 0 costs nothing, and need not have the tokens that all others have. A tensor is read, which waits
            for its device and ends a compiled graph.
        mixture: `"arithmetic"` or `"geometric"`.
        vocab_map: for vocabularies of different size or order: (V,) integers, for each token of the student that of the
            teacher, negative where it has none; one that is named twice counts twice. Or a list of these or None, one
            for each teacher. `"truncate"` says that the first tokens are the same. p and q are then distributions over
            the tokens that all have, each renormalised; the others have no gradient from D. The cross-entropy is over
            all of the student's.
        weights: (...), of either sign, one per point; a mask may be boolean. A point of weight 0 does not count: what
            it holds, NaN included, reaches neither the loss nor a gradient. No gradient flows into weights.
        ignore_index: see labels.
        reduction: `"mean"` divides by the sum of the weights of the points that count (their number without weights;
            if nothing counts, the loss is 0), `"sum"` adds up, `"none"` returns weights · loss in the shape of the
            leading dimensions.
        backend: `"auto"`, `"reference"`, `"native"` (CPU) or `"triton"` (GPU). One that was asked for by name and
            cannot serve raises.

    Logits are float32 whatever the dtype of states and heads (float64 where any is float64), and so is the loss;
    gradients have their argument's dtype. float16 on the CPU is the reference's, whose logits are all there; the other
    backends hold the logits of a block of points at a time:
    memory does not grow with the number of points. They are differentiable once, backwards; the reference any way.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices, labels or options do not fit; the message names the argument.
    """
    weights = as_weights(weights)
    heads, listed = as_head("student_head", student_head), as_teachers(teachers, teacher_heads)
    options = (divergence, temperature, beta, alpha, mixture, ignore_index, reduction, backend)
    shares = as_shares(teacher_weights, len(listed))
    plan = _planned(student, heads, listed, shares, labels, weights, options)
    if plan.once is not None and vocab_map is None:
        ((teacher, other),) = listed
        return at_once.loss(plan.once, student, heads, teacher, other)  # type: ignore[arg-type]
    call, needs = _call(plan, student, heads, listed, shares, vocab_map, labels, weights, options)
    if plan.backend.backend == "reference":
        if undisturbed():
            stream.check_labels(call.labels, call.weights, call.student.width)
        losses = reference.weighted_losses(call)
        return losses.reshape(plan.leading) if reduction == "none" else _divided(losses.sum(), call, plan)
    tensors, numbers = pack([call.student, *call.teachers])
    numbers = [call.temperature, call.beta, call.alpha, *numbers]
    data = (call.excluded, call.labels, call.weights, call.divergence, call.mixture)
    watched = [*tensors, *data[:3]]
    if reduction == "none":
        run = schema.linear_distillation_points.route(watched)
        return run(tensors, numbers, *data, plan.backend.backend).reshape(plan.leading)
    run = schema.linear_distillation.route(watched)
    return _divided(run(tensors, numbers, *data, needs, plan.backend.backend, call.divisor)[0], call, plan)


class _Plan(NamedTuple):
    """What is decided of a call."""

    backend: backends.Implementation
    leading: tuple[int, ...]
    cast: torch.dtype | None  # what autocast makes of states and heads
    dtype: torch.dtype  # of sums
    mean: bool
    once: at_once.AtOnce | None  # how, where one step does it all
    late: bool  # the mean is taken of the total: float16 gradients would lose small numbers before a scaler saw them


def _planned(
    student: Tensor, head: Head | None, teachers: Sequence[tuple[Teacher, Head | None]], shares: tuple[float, ...],
    labels: Tensor | None, weights: Tensor | None, options: tuple[Any, ...],
) -> _Plan:  # fmt: skip
    """The plan of a checked call."""
    cast = autocast_dtype(student)
    flat = tensors_of(student, head, teachers)

    def decide() -> _Plan:
        return _plan(student, head, teachers, labels, weights, options, cast)

    numbers = [x for h in (head, *(h for _, h in teachers)) if h is not None for x in h[4:]]
    key = (*options, *numbers, len(teachers), shares, backends.default(), cast, torch.is_grad_enabled())
    return PLANS.find((*flat, labels, weights), key, decide)


def prepare(
    student: Tensor, head: Head | None, teachers: Sequence[tuple[Teacher, Head | None]], teacher_weights: Any,
    vocab_map: Any, labels: Tensor | None, weights: Tensor | None, options: tuple[Any, ...],
) -> tuple[_Plan, Call, list[bool]]:  # fmt: skip
    """The plan of a checked call, the call itself, and which of the student's tensors need a gradient."""
    shares = as_shares(teacher_weights, len(teachers))
    plan = _planned(student, head, teachers, shares, labels, weights, options)
    return plan, *_call(plan, student, head, teachers, shares, vocab_map, labels, weights, options)


def _call(
    plan: _Plan, student: Tensor, head: Head | None, teachers: Sequence[tuple[Teacher, Head | None]],
    shares: tuple[float, ...], vocab_map: Any, labels: Tensor | None, weights: Tensor | None, options: tuple[Any, ...],
) -> tuple[Call, list[bool]]:  # fmt: skip
    """The call of a plan, and which of the student's tensors need a gradient."""
    divergence, temperature, beta, alpha, mixture, ignore_index, *_ = options
    N = prod(plan.leading)
    if weights is not None:
        weights = weights.reshape(N)
    if labels is not None:
        labels = labels.reshape(N).long().contiguous()
        counts = labels != ignore_index
        weights = counts.to(plan.dtype) if weights is None else torch.where(counts, weights, 0)
    if weights is not None and plan.mean and not plan.late:
        wide = weights.double()  # the sum of large weights is beyond float32, and small ones are not nothing
        weights = wide / nonzero(wide.sum())
    weights = None if weights is None else weights.to(plan.dtype)
    own = side_of(student, head, N, plan.cast, weights)
    sides = [_teacher_side(x, h, N, plan.cast, share) for (x, h), share in zip(teachers, shares, strict=True)]
    maps = as_maps(vocab_map, len(sides))
    served = [k for k, side in enumerate(sides) if side.share > SMALLEST]  # 0 · −∞ is no number, and costs as much
    sides, excluded = common(own.vocabulary, sides, maps, served, own.states, plan.dtype)
    divisor = max(N, 1) if plan.mean and weights is None and not plan.late else 1
    call = Call(
        own, sides, excluded, labels, weights, divergence, mixture, float(temperature), float(beta), float(alpha),
        divisor, plan.dtype,
    )  # fmt: skip
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in own.tensors[:TRAINED]]
    return call, needs


def _plan(
    student: Tensor, head: Head | None, teachers: Sequence[tuple[Teacher, Head | None]], labels: Tensor | None,
    weights: Tensor | None, options: tuple[Any, ...], cast: torch.dtype | None,
) -> _Plan:  # fmt: skip
    """Raises unless everything fits."""
    divergence, temperature, beta, alpha, mixture, ignore_index, reduction, backend = options
    check_choice("divergence", divergence, reference.DIVERGENCES)
    check_choice("mixture", mixture, reference.MIXTURES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_range("temperature", temperature, 0, float("inf"), "above 0 and finite")
    check_range("beta", beta, 0, 1, 'above 0 and below 1 (at its ends are "forward_kl" and "reverse_kl")')
    check_range("alpha", alpha, 0, 1, "from 0 to 1", closed=True)
    if not is_whole(ignore_index):
        raise TypeError(f"ignore_index is {ignore_index!r}, but must be a whole number")
    if alpha < 1 and labels is None:
        raise ValueError(f"alpha is {alpha}, so part of the loss is of labels, but labels is None")
    leading = check_side("student", "student_head", student, head, None, weights)
    device = student.device
    for name, (x, h) in zip(names("teachers", len(teachers)), teachers, strict=True):
        check_side(name, name.replace("teachers", "teacher_heads"), x, h, (leading, device), None)
    if labels is not None:
        check_labels(labels, leading, device)
    present = [x for x in tensors_of(student, head, teachers) if x is not None and x.is_floating_point()]
    dtypes = {x.dtype for x in present if cast is None or x.dtype is torch.float64} | ({cast} if cast else set())
    chosen = backends.choose(OP, backend, device.type, dtypes)
    if chosen.backend != "reference":
        backends.refuse_tangents(OP, present)
    mean = reduction == "mean"
    late = mean and any(x.dtype is torch.float16 for x in present)
    dtype, once = accumulation_dtype(*present), None
    if chosen.backend == "native" and labels is weights is cast is None and undisturbed():
        once = at_once.decide(student, head, teachers, options, leading, dtype)
    return _Plan(chosen, leading, cast, dtype, mean, once, late)


def _divided(total: Tensor, call: Call, plan: _Plan) -> Tensor:
    if not plan.late:
        return total
    return total / (max(prod(plan.leading), 1) if call.weights is None else nonzero(call.weights.sum()))


def _teacher_side(x: Teacher, head: Head | None, N: int, cast: torch.dtype | None, share: float) -> Side:
    if isinstance(x, TopKTeacher):
        return Side(
            x.log_probs.detach().reshape(N, x.k), indices=x.indices.reshape(N, x.k),
            rest=None if x.rest is None else x.rest.detach().reshape(N), share=share,
            spread=float(x.tail == "uniform"), vocabulary=x.vocabulary,
        )  # fmt: skip
    if head is not None:
        weight, bias, lora_A, lora_B = (None if y is None else y.detach() for y in head[:4])
        head = Head(weight, bias, lora_A, lora_B, *head[4:])  # type: ignore[arg-type]
    return side_of(x.detach(), head, N, cast)._replace(share=share)


def _explain(**a: Any) -> backends.Explanation:
    weights = as_weights(a["weights"])
    head, teachers = as_head("student_head", a["student_head"]), as_teachers(a["teachers"], a["teacher_heads"])
    options = tuple(a[name] for name in OPTIONS)
    plan, call, needs = prepare(
        a["student"], head, teachers, a["teacher_weights"], a["vocab_map"], a["labels"], weights, options
    )
    dtypes = {x.dtype for x in tensors_of(a["student"], head, teachers) if x is not None and x.is_floating_point()}
    reasons = backends.passed_over(OP, plan.backend, a["student"].device.type, dtypes)
    method = "eager" if plan.backend.backend == "reference" else "streamed"
    return backends.Explanation(OP, plan.backend.backend, method, reasons, methods.costs(call, needs))


backends.register_explainer(linear_distillation_loss, _explain)
