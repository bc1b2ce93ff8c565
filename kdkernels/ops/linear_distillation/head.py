"""Heads: what they are, that they fit, and what implementations see of them."""

from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.contract import Contract, show, without_autocast
from kdkernels.ops.linear_distillation.call import Side, accumulation_dtype

LARGEST = 3.4e38  # of the numbers, which kernels read as float32
SMALLEST = 1.2e-38


class Head(NamedTuple):
    """What makes logits of hidden states h: softcap · tanh(scale · (h Wᵀ + b + scaling · (ĥ Aᵀ) Bᵀ) / softcap).

    Attributes:
        weight: (V, d), as in `torch.nn.Linear`.
        bias: (V,). An entry of −∞ takes its token out.
        lora_A, lora_B: (r, d) and (V, r), an adapter that is not merged; both or neither.
        scaling: of the adapter.
        dropout_p: of the adapter's input ĥ, from torch's generator; 0 while evaluating.
        scale: of the logits (Cohere's `logit_scale`, 1 over Granite's `logits_scaling`), above 0.
        softcap: of the logits (Gemma 2's `final_logit_softcapping`), above 0; None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    scale: float = 1.0
    softcap: float | None = None


def as_head(name: str, head: Any) -> Head | None:
    """Raises TypeError for what is no head."""
    if head is None or isinstance(head, Head):
        return head
    if isinstance(head, Tensor):
        return Head(head)
    raise TypeError(f"{name} is {type(head).__name__}, but must be a torch.Tensor, a kdkernels.Head or None")


def check_head(name: str, head_name: str, x: Any, head: Head | None, weights: Tensor | None = None) -> dict[str, Any]:
    """The sizes of points and head by letter: `...`, V and, beside a head, d. Raises TypeError or ValueError."""
    shapes, tensors = {name: "... d" if head is not None else "... V"}, {name: x}
    if head is not None:
        bare = all(value is None for value in head[1:4])
        for field, shape in zip(Head._fields[:4], ("V d", "V?", "r d?", "V r?"), strict=True):
            full = head_name if field == "weight" and bare else f"{head_name}.{field}"
            shapes[full], tensors[full] = shape, getattr(head, field)
        check_numbers(head_name, head)
    if weights is not None:
        shapes["weights"], tensors["weights"] = "...", weights
    sizes = Contract(**shapes).bind(tensors)
    if sizes["V"] < 1:
        raise ValueError(f"{head_name if head is not None else name} has no token, but must have at least one")
    return sizes


def check_numbers(name: str, head: Head) -> None:
    if (head.lora_A is None) != (head.lora_B is None):
        raise ValueError(f"{name} has one of lora_A and lora_B, but must have both or neither")
    if head.lora_A is not None and head.lora_A.shape[0] < 1:
        raise ValueError(f"{name}.lora_A has shape {show(head.lora_A.shape)}, but must have a rank of at least 1")
    check_range(f"{name}.scaling", head.scaling, -LARGEST, LARGEST, "finite, in float32 too")
    if not 0 <= number(f"{name}.dropout_p", head.dropout_p) < 1:
        raise ValueError(f"{name}.dropout_p is {head.dropout_p}, but must be at least 0 and below 1")
    check_range(f"{name}.scale", head.scale, SMALLEST, LARGEST, "above 0 and finite, in float32 too")
    if head.softcap is not None:
        check_range(f"{name}.softcap", head.softcap, SMALLEST, LARGEST, "above 0 and finite, in float32 too, or None")


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {type(value).__name__}, but must be a number")
    return float(value)


def check_range(name: str, value: Any, low: float, high: float, what: str, closed: bool = False) -> None:
    x = number(name, value)
    if not (low <= x <= high if closed else low < x < high):
        raise ValueError(f"{name} is {value}, but must be {what}")


def side_of(x: Tensor, head: Head | None, N: int, cast: torch.dtype | None, weights: Tensor | None = None) -> Side:
    """The operands of hidden states and head, or of logits, with one leading dimension."""
    x = x.reshape(N, x.shape[-1])
    if head is None:
        return Side(x, vocabulary=x.shape[-1])
    weight, low = head.weight, None
    if cast is not None:
        x, weight = (y if y.dtype is torch.float64 else y.to(cast) for y in (x, weight))
    if head.lora_A is not None:
        # its gradients are autograd's, which would meet the NaN of a point that does not count
        points = x if weights is None else torch.where((weights != 0)[:, None], x, 0)
        low = adapted(points, head, head.lora_A)
    return Side(
        x, weight, head.bias, low, head.lora_B, scale=float(head.scale), softcap=float(head.softcap or 0),
        vocabulary=weight.shape[0],
    )  # fmt: skip


def adapted(x: Tensor, head: Head, lora_A: Tensor) -> Tensor:
    """(N, r): scaling · x̂ Aᵀ of an adapter, which stays precise under autocast."""
    wide = accumulation_dtype(x, lora_A)
    with without_autocast(x):
        return head.scaling * F.linear(F.dropout(x.to(wide), head.dropout_p), lora_A.to(wide))
