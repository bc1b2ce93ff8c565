"""`linear_distillation_loss`: the documented function, its checks and its choice of implementation."""

from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import Contract, autocast_dtype, check_choice, is_whole, show
from kdkernels.losses import as_weights, nonzero
from kdkernels.ops.linear_distillation import method as methods
from kdkernels.ops.linear_distillation import reference, schema, stream
from kdkernels.ops.linear_distillation.call import TENSORS, TRAINED, Call, Head, Side, accumulation_dtype, pack
from kdkernels.ops.linear_distillation.top_k import TopKTeacher
from kdkernels.ops.linear_distillation.vocabulary import Vocabularies, as_maps, common
from kdkernels.plans import Plans, undisturbed

OP = "linear_distillation_loss"
PLANS = Plans()
REDUCTIONS = ("mean", "sum", "none")
SUM_SLACK = 1e-4  # by which teacher_weights may miss a sum of 1

Teacher = Tensor | TopKTeacher


def linear_distillation_loss(
    student: Tensor,
    student_head: Tensor | Head | None,
    teachers: Teacher | Sequence[Teacher],
    teacher_heads: Tensor | Head | None | Sequence[Tensor | Head | None] = None,
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
            weight 0 costs nothing.
        mixture: `"arithmetic"` or `"geometric"`.
        vocab_map: for vocabularies of different size or order: (V,) integers, for each token of the student that of the
            teacher, −1 where it has none; or a list of these or None, one for each teacher. `"truncate"` says that
            the first tokens are the same. p and q are then distributions over the tokens that all have, each
            renormalised; the others have no gradient from D. The cross-entropy is over all of the student's.
        weights: (...), of either sign, one per point; a mask may be boolean. A point of weight 0 does not count: what
            it holds, NaN included, reaches neither the loss nor a gradient. No gradient flows into weights.
        ignore_index: see labels.
        reduction: `"mean"` divides by the sum of the weights of the points that count (their number without weights;
            if nothing counts, the loss is 0), `"sum"` adds up, `"none"` returns weights · loss in the shape of the
            leading dimensions.
        backend: `"auto"`, `"reference"`, `"native"` (CPU) or `"triton"` (GPU). One that was asked for by name and
            cannot serve raises.

    Logits are float32 whatever the dtype of states and heads (float64 where any is float64), and so is the loss;
    gradients have their argument's dtype. The accelerated backends hold the logits of a block of points at a time:
    memory does not grow with the number of points. They are differentiable once, backwards; the reference any way.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices, labels or options do not fit; the message names the argument.
    """
    weights = as_weights(weights)
    heads, listed = _as_head("student_head", student_head), _as_teachers(teachers, teacher_heads)
    options = (divergence, temperature, beta, alpha, mixture, ignore_index, reduction, backend)
    plan, call, needs = _prepare(student, heads, listed, teacher_weights, vocab_map, labels, weights, options)
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
    shares: tuple[float, ...]
    mean: bool
    late: bool  # the mean is taken of the total: float16 gradients would lose small numbers before a scaler saw them


def _prepare(
    student: Tensor, head: Head | None, teachers: Sequence[tuple[Teacher, Head | None]], teacher_weights: Any,
    vocab_map: Any, labels: Tensor | None, weights: Tensor | None, options: tuple[Any, ...],
) -> tuple[_Plan, Call, list[bool]]:  # fmt: skip
    """The plan of a checked call, the call itself, and which of the student's tensors need a gradient."""
    divergence, temperature, beta, alpha, mixture, ignore_index, reduction, backend = options
    cast = autocast_dtype(student)
    shares = _as_shares(teacher_weights, len(teachers))
    flat = _tensors(student, head, teachers)

    def decide() -> _Plan:
        return _plan(student, head, teachers, shares, labels, weights, options, cast)

    numbers = [x for h in (head, *(h for _, h in teachers)) if h is not None for x in h[4:]]
    key = (*options, *numbers, len(teachers), shares, backends.default(), cast, torch.is_grad_enabled())
    plan = PLANS.find((*flat, labels, weights), key, decide)
    N = prod(plan.leading)
    own = _side(student, head, N, plan.cast)
    sides = [_teacher_side(x, h, N, plan.cast, share) for (x, h), share in zip(teachers, plan.shares, strict=True)]
    maps, names = as_maps(vocab_map, len(sides)), _names("teachers", len(sides))
    kept = [k for k, side in enumerate(sides) if side.share > 0]  # 0 · −∞ is no number, and costs as much
    served = [sides[k] for k in kept]
    dtype = accumulation_dtype(*(x for side in (own, *served) for x in side[:TENSORS]))
    maps = None if maps is None else [maps[k] for k in kept]
    served, excluded = common(own.vocabulary, served, maps, [names[k] for k in kept], own.states, dtype)
    if labels is not None:
        labels = labels.reshape(N)
        counts = labels != ignore_index
        weights = counts.to(dtype) if weights is None else torch.where(counts, weights.reshape(N).to(dtype), 0)
        labels = labels.long().contiguous()
    elif weights is not None:
        weights = weights.reshape(N).to(dtype)
    if weights is not None and own.low is not None:  # the adapter's own gradient is autograd's: see there no NaN
        own = own._replace(low=_low(torch.where((weights != 0)[:, None], own.states, 0), head, plan.cast))
    divisor = max(N, 1) if plan.mean and weights is None and not plan.late else 1
    if plan.mean and weights is not None and not plan.late:
        weights = weights / nonzero(weights.sum())
    call = Call(
        own, served, excluded, labels, weights, divergence, mixture, float(temperature), float(beta), float(alpha),
        divisor,
    )  # fmt: skip
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in own[:TRAINED]]
    return plan, call, needs


def _plan(
    student: Tensor, head: Head | None, teachers: Sequence[tuple[Teacher, Head | None]], shares: tuple[float, ...],
    labels: Tensor | None, weights: Tensor | None, options: tuple[Any, ...], cast: torch.dtype | None,
) -> _Plan:  # fmt: skip
    """Raises unless everything fits."""
    divergence, temperature, beta, alpha, mixture, ignore_index, reduction, backend = options
    check_choice("divergence", divergence, reference.DIVERGENCES)
    check_choice("mixture", mixture, reference.MIXTURES)
    check_choice("reduction", reduction, REDUCTIONS)
    _check_range("temperature", temperature, 0, float("inf"), "above 0 and finite")
    _check_range("beta", beta, 0, 1, 'above 0 and below 1 (at its ends are "forward_kl" and "reverse_kl")')
    _check_range("alpha", alpha, 0, 1, "from 0 to 1", closed=True)
    if not is_whole(ignore_index):
        raise TypeError(f"ignore_index is {ignore_index!r}, but must be a whole number")
    if alpha < 1 and labels is None:
        raise ValueError(f"alpha is {alpha}, so part of the loss is of labels, but labels is None")
    leading = _check_side("student", "student_head", student, head, None, weights)
    device = student.device
    for name, (x, h) in zip(_names("teachers", len(teachers)), teachers, strict=True):
        _check_side(name, name.replace("teachers", "teacher_heads"), x, h, (leading, device), None)
    if labels is not None:
        _check_labels(labels, leading, device)
    present = [x for x in _tensors(student, head, teachers) if x is not None and x.is_floating_point()]
    dtypes = {x.dtype for x in present if cast is None or x.dtype is torch.float64} | ({cast} if cast else set())
    chosen = backends.choose(OP, backend, device.type, dtypes)
    if chosen.backend != "reference":
        backends.refuse_tangents(OP, present)
    mean = reduction == "mean"
    late = mean and any(x.dtype is torch.float16 for x in present)
    return _Plan(chosen, leading, cast, shares, mean, late)


def _divided(total: Tensor, call: Call, plan: _Plan) -> Tensor:
    if not plan.late:
        return total
    return total / (max(prod(plan.leading), 1) if call.weights is None else nonzero(call.weights.sum()))


def _as_head(name: str, head: Any) -> Head | None:
    """Raises TypeError for what is no head."""
    if head is None or isinstance(head, Head):
        return head
    if isinstance(head, Tensor):
        return Head(head)
    raise TypeError(f"{name} is {type(head).__name__}, but must be a torch.Tensor, a kdkernels.Head or None")


def _as_teachers(teachers: Any, heads: Any) -> list[tuple[Teacher, Head | None]]:
    """Each teacher and its head."""
    alone = isinstance(teachers, (Tensor, TopKTeacher))
    if alone:
        teachers = [teachers]
    if not isinstance(teachers, (list, tuple)):
        raise TypeError(f"teachers is {type(teachers).__name__}, but must be a tensor, a TopKTeacher or a list of them")
    if not teachers:
        raise ValueError("teachers is empty, but must have at least one teacher")
    if heads is None:
        heads = [None] * len(teachers)
    elif isinstance(heads, (Tensor, Head)):
        heads = [heads]
    if not isinstance(heads, (list, tuple)):
        raise TypeError(f"teacher_heads is {type(heads).__name__}, but must be a tensor, a Head, None or a list of them")
    if len(heads) != len(teachers):
        raise ValueError(f"teacher_heads has {len(heads)} entries, but must have one for each of {len(teachers)} teachers")
    named = zip(_names("teacher_heads", len(heads)), heads, strict=True)
    return list(zip(teachers, [_as_head(name, head) for name, head in named], strict=True))


def _names(name: str, count: int) -> list[str]:
    return [f"{name}[{k}]" for k in range(count)]


def _as_shares(teacher_weights: Any, K: int) -> tuple[float, ...]:
    """π, normalised."""
    if teacher_weights is None:
        return (1 / K,) * K
    try:
        found = teacher_weights.tolist() if isinstance(teacher_weights, Tensor) else list(teacher_weights)
        shares = [float(x) for x in found]
    except (TypeError, ValueError):
        raise TypeError(f"teacher_weights is {teacher_weights!r}, but must hold one number for each teacher") from None
    if len(shares) != K:
        raise ValueError(f"teacher_weights has {len(shares)} entries, but must have one for each of {K} teachers")
    total = sum(shares)
    if not (min(shares) >= 0 and abs(total - 1) <= SUM_SLACK):
        raise ValueError(f"teacher_weights is {shares}, but must be numbers of at least 0 whose sum is 1, not {total:.6g}")
    return tuple(x / total for x in shares)


def _tensors(student: Tensor, head: Head | None, teachers: Sequence[tuple[Teacher, Head | None]]) -> list[Any]:
    """All tensors that a plan depends on."""
    found: list[Any] = [student, *(head or ())[:4]]
    for x, h in teachers:
        found += [x.log_probs, x.indices] if isinstance(x, TopKTeacher) else [x]
        found += (h or ())[:4]
    return found


def _check_side(name: str, head_name: str, x: Any, head: Head | None, like: Any, weights: Tensor | None) -> tuple[int, ...]:
    """The leading dimensions of one side, which are those of `like`."""
    if isinstance(x, TopKTeacher):
        if head is not None:
            raise ValueError(f"{head_name} was given, but {name} is a TopKTeacher, which has no head: it must be None")
        name, x = f"{name}.log_probs", x.log_probs
    shapes, tensors = {name: "... d" if head is not None else "... V"}, {name: x}
    if head is not None:
        bare = all(value is None for value in head[1:4])
        for field, shape in zip(Head._fields[:4], ("V d", "V?", "r d?", "V r?"), strict=True):
            full = head_name if field == "weight" and bare else f"{head_name}.{field}"
            shapes[full], tensors[full] = shape, getattr(head, field)
        _check_numbers(head_name, head)
    if weights is not None:
        shapes["weights"], tensors["weights"] = "...", weights
    sizes = Contract(**shapes).bind(tensors)
    if sizes["V"] < 1:
        raise ValueError(f"{head_name if head is not None else name} has no token, but must have at least one")
    leading = sizes["..."]
    if like is not None:
        if leading != like[0]:
            raise ValueError(
                f"{name} has shape {show(x.shape)}, but must have the leading dimensions {show(like[0])} of student"
            )
        if x.device != like[1]:
            raise ValueError(f"{name} is on {x.device}, but student is on {like[1]}: one device, please")
    return leading


def _check_numbers(name: str, head: Head) -> None:
    if (head.lora_A is None) != (head.lora_B is None):
        raise ValueError(f"{name} has one of lora_A and lora_B, but must have both or neither")
    if head.lora_A is not None and head.lora_A.shape[0] < 1:
        raise ValueError(f"{name}.lora_A has shape {show(head.lora_A.shape)}, but must have a rank of at least 1")
    largest = float("inf")
    _check_range(f"{name}.scaling", head.scaling, -largest, largest, "finite")
    if not 0 <= _number(f"{name}.dropout_p", head.dropout_p) < 1:
        raise ValueError(f"{name}.dropout_p is {head.dropout_p}, but must be at least 0 and below 1")
    _check_range(f"{name}.scale", head.scale, 0, largest, "above 0 and finite")
    if head.softcap is not None:
        _check_range(f"{name}.softcap", head.softcap, 0, largest, "above 0 and finite, or None")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {type(value).__name__}, but must be a number")
    return float(value)


def _check_range(name: str, value: Any, low: float, high: float, what: str, closed: bool = False) -> None:
    x = _number(name, value)
    if not (low <= x <= high if closed else low < x < high):
        raise ValueError(f"{name} is {value}, but must be {what}")


def _check_labels(labels: Any, leading: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is {type(labels).__name__}, but must be a torch.Tensor")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}, but must be integers")
    if labels.shape != leading:
        raise ValueError(
            f"labels has shape {show(labels.shape)}, but must be {show(leading)}, the leading dimensions of student"
        )
    if labels.device != device:
        raise ValueError(f"labels is on {labels.device}, but student is on {device}: one device, please")


def _side(x: Tensor, head: Head | None, N: int, cast: torch.dtype | None) -> Side:
    """The operands of hidden states and head, or of logits, with one leading dimension."""
    x = x.reshape(N, x.shape[-1])
    if head is None:
        return Side(x, vocabulary=x.shape[-1])
    weight, bias = head.weight, head.bias
    if cast is not None:
        x, weight = (y if y.dtype is torch.float64 else y.to(cast) for y in (x, weight))
    return Side(
        x, weight, bias, _low(x, head, cast), head.lora_B, scale=float(head.scale), softcap=float(head.softcap or 0),
        vocabulary=weight.shape[0],
    )  # fmt: skip


def _low(x: Tensor, head: Head | None, cast: torch.dtype | None) -> Tensor | None:
    """(N, r): scaling · ĥ Aᵀ of an adapter, which stays precise under autocast."""
    if head is None or head.lora_A is None:
        return None
    wide = accumulation_dtype(x, head.lora_A)
    with nullcontext() if cast is None else torch.autocast(x.device.type, enabled=False):
        return head.scaling * F.linear(F.dropout(x.to(wide), head.dropout_p), head.lora_A.to(wide))


def _teacher_side(x: Teacher, head: Head | None, N: int, cast: torch.dtype | None, share: float) -> Side:
    if isinstance(x, TopKTeacher):
        return Side(
            x.log_probs.detach().reshape(N, x.k), indices=x.indices.reshape(N, x.k), share=share,
            spread=float(x.tail == "uniform"), vocabulary=x.vocabulary,
        )  # fmt: skip
    head = None if head is None else head._replace(**{f: _detached(getattr(head, f)) for f in head._fields[:4]})
    return _side(x.detach(), head, N, cast)._replace(share=share)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _explain(**a: Any) -> backends.Explanation:
    weights = as_weights(a["weights"])
    head, teachers = _as_head("student_head", a["student_head"]), _as_teachers(a["teachers"], a["teacher_heads"])
    names = ("divergence", "temperature", "beta", "alpha", "mixture", "ignore_index", "reduction", "backend")
    options = tuple(a[name] for name in names)
    plan, call, needs = _prepare(
        a["student"], head, teachers, a["teacher_weights"], a["vocab_map"], a["labels"], weights, options
    )
    dtypes = {x.dtype for x in _tensors(a["student"], head, teachers) if x is not None and x.is_floating_point()}
    reasons = backends.passed_over(OP, plan.backend, a["student"].device.type, dtypes)
    method = "eager" if plan.backend.backend == "reference" else "streamed"
    return backends.Explanation(OP, plan.backend.backend, method, reasons, methods.costs(call, needs))


backends.register_explainer(linear_distillation_loss, _explain)
