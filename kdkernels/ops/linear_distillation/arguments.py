"""What a user passes to `linear_distillation_loss`, brought into one form, or refused by name."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.contract import show
from kdkernels.ops.linear_distillation.head import Head, as_head, check_head
from kdkernels.ops.linear_distillation.top_k import TopKTeacher

Teacher = Tensor | TopKTeacher
SUM_SLACK = 1e-4  # by which teacher_weights may miss a sum of 1


def as_teachers(teachers: Any, heads: Any) -> list[tuple[Teacher, Head | None]]:
    """Each teacher and its head."""
    if isinstance(teachers, (Tensor, TopKTeacher)):
        if heads is None or isinstance(heads, (Tensor, Head)):
            return [(teachers, as_head("teacher_heads", heads))]
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
        raise TypeError(
            f"teacher_heads is {type(heads).__name__}, but must be a tensor, a Head, None or a list of them"
        )
    if len(heads) != len(teachers):
        raise ValueError(
            f"teacher_heads has {len(heads)} entries, but must have one for each of {len(teachers)} teachers"
        )
    named = zip(names("teacher_heads", len(heads)), heads, strict=True)
    return list(zip(teachers, [as_head(name, head) for name, head in named], strict=True))


def names(name: str, count: int) -> list[str]:
    return [f"{name}[{k}]" for k in range(count)]


def as_shares(teacher_weights: Any, K: int) -> tuple[float, ...]:
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
        raise ValueError(
            f"teacher_weights is {shares}, but must be numbers of at least 0 whose sum is 1, not {total:.6g}"
        )
    return tuple(x / total for x in shares)


def tensors_of(student: Tensor, head: Head | None, teachers: Sequence[tuple[Teacher, Head | None]]) -> list[Any]:
    """All tensors that a plan depends on."""
    found: list[Any] = [student, *(head or ())[:4]]
    for x, h in teachers:
        found += [x.log_probs, x.indices, x.rest] if isinstance(x, TopKTeacher) else [x]
        found += (h or ())[:4]
    return found


def check_side(
    name: str, head_name: str, x: Any, head: Head | None, like: Any, weights: Tensor | None
) -> tuple[int, ...]:
    """The leading dimensions of one side, which are those of `like`."""
    if isinstance(x, TopKTeacher):
        if head is not None:
            raise ValueError(f"{head_name} was given, but {name} is a TopKTeacher, which has no head: it must be None")
        name, x = f"{name}.log_probs", x.log_probs
    leading = check_head(name, head_name, x, head, weights)["..."]
    if like is not None:
        if leading != like[0]:
            raise ValueError(
                f"{name} has shape {show(x.shape)}, but must have the leading dimensions {show(like[0])} of student"
            )
        if x.device != like[1]:
            raise ValueError(f"{name} is on {x.device}, but student is on {like[1]}: one device, please")
    return leading


def check_labels(labels: Any, leading: tuple[int, ...], device: torch.device) -> None:
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
