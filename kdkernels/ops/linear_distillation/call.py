"""A call packed into tensors and numbers, as torch.library, autograd and every implementation pass it on.

`tensors` are those of the student's `Side`, then of each teacher's; `numbers` are temperature, beta and alpha, then
those of each side. Gradients, and which of them are needed, stand in the order of `tensors`; only the student has any.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.contract import resolved


class Side(NamedTuple):
    """The student or one teacher, as implementations see it."""

    states: Tensor  # (N, d); without a weight (N, V) logits, or (N, k) log-probabilities
    weight: Tensor | None = None  # (V, d)
    bias: Tensor | None = None  # (V,)
    low: Tensor | None = None  # (N, r): scaling · ĥ Aᵀ
    low_head: Tensor | None = None  # (V, r): B
    indices: Tensor | None = None  # (N, k): the tokens of log-probabilities
    rest: Tensor | None = None  # (N,): the logarithm of what all other tokens have together, if it is known
    columns: Tensor | None = None  # (V_student,): a teacher's token for each of the student's, those without one aside
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    share: float = 1.0  # π
    spread: float = 0.0  # of log-probabilities: 1 where the remaining mass is spread over the other tokens
    vocabulary: int = 0  # V of this side

    @property
    def tensors(self) -> list[Tensor | None]:
        """Those of them, absent ones too."""
        return list(self[:TENSORS])  # type: ignore[arg-type]

    @property
    def numbers(self) -> list[float]:
        """The others."""
        return [float(x) for x in self[TENSORS:]]  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Logits that the states themselves have, or their head."""
        return self.states.shape[1] if self.weight is None else self.weight.shape[0]


TENSORS = 8  # of a side; the rest are numbers
NUMBERS = len(Side._fields) - TENSORS
TRAINED = 5  # the first tensors of the student have gradients
COMMON = 3  # numbers before those of the sides


class Call(NamedTuple):
    """What an implementation computes."""

    student: Side
    teachers: list[Side]
    excluded: Tensor | None  # (V,): not 0 where a token is not common to all
    labels: Tensor | None  # (N,) int64
    weights: Tensor | None  # (N,)
    divergence: str
    mixture: str
    temperature: float
    beta: float
    alpha: float
    divisor: int  # of every weight
    dtype: torch.dtype  # of sums, and of the loss


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any argument is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype is torch.float64 for x in tensors) else torch.float32


def pack(sides: Sequence[Side]) -> tuple[list[Tensor | None], list[float]]:
    """`tensors`, and the numbers of the sides."""
    tensors: list[Tensor | None] = []
    numbers: list[float] = []
    for side in sides:
        tensors += side.tensors
        numbers += side.numbers
    return tensors, numbers


def unpack(tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> list[Side]:
    """The sides, their tensors as they lie in memory. Under torch.library an absent one has no elements."""
    found: list[Any] = [None if x is None or (x.dim() == 1 and not x.numel()) else resolved(x) for x in tensors]
    sides = []
    for k in range(len(found) // TENSORS):
        scale, softcap, share, spread, vocabulary = numbers[COMMON + NUMBERS * k : COMMON + NUMBERS * (k + 1)]
        own = found[TENSORS * k : TENSORS * (k + 1)]
        sides.append(Side(*own, scale, softcap, share, spread, int(vocabulary)))  # type: ignore[call-arg]
    return sides
