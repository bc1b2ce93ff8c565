"""Diagonal state-space models as callers hold them, checked and made into batches.

One model is Lambda (..., n), B (..., n, m), C (..., p, n) with leading dimensions that broadcast; a list of models of
different sizes becomes a few batches, padded with states that nothing reaches: λ = 0, b = 0, c = 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import Contract, check_tensor
from kdkernels.ops.hankel.kernel import wide
from kdkernels.ops.hankel.reference import inside
from kdkernels.plans import Plans

CONTRACT = Contract(backends.REAL_OR_COMPLEX, Lambda="* n", B="* n m", C="* p n")
NAMES = ("Lambda", "B", "C")
PLANS = Plans()
Operand = Tensor | Sequence[Tensor]


class System(NamedTuple):
    """One argument triple with common leading dimensions and dtype."""

    Lambda: Tensor  # (..., n)
    B: Tensor  # (..., n, m)
    C: Tensor  # (..., p, n)

    @property
    def leading(self) -> tuple[int, ...]:
        """All dimensions but the state's."""
        return tuple(self.Lambda.shape[:-1])

    @property
    def order(self) -> int:
        """n."""
        return self.Lambda.shape[-1]

    def flat(self) -> "System":
        """(N, n), (N, n, m), (N, p, n)."""
        leading = self.leading
        if len(leading) == 1:
            return self
        return System(*(x.reshape(prod(leading), *x.shape[len(leading) :]) for x in self))

    def padded(self, n: int, m: int, p: int) -> "System":
        """The same with more states, inputs and outputs."""
        rows, inputs, outputs = n - self.order, m - self.B.shape[-1], p - self.C.shape[-2]
        if not (rows or inputs or outputs):
            return self
        return System(
            F.pad(self.Lambda, (0, rows)), F.pad(self.B, (0, inputs, 0, rows)), F.pad(self.C, (0, rows, 0, outputs))
        )

    def doubled(self) -> "System":
        """(Λ, B, C/2) beside its conjugate: the real system whose output is Re(Ch)."""
        half = 0.5 * self.C
        return System(
            torch.cat([self.Lambda, self.Lambda.conj()], -1),
            torch.cat([self.B, self.B.conj()], -2),
            torch.cat([half, half.conj()], -1),
        )


@dataclass(frozen=True)
class Systems:
    """A checked call: one system, or a list."""

    members: list[System]
    is_list: bool

    def each(
        self,
        compute: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]],
        cuts: Sequence[Callable[[Tensor, int], Tensor]] = (),
    ) -> Any:
        """`compute` of every batch (N, …), taken apart again: one result, or a list of them.

        A result is a tensor or a tuple of tensors; each of its `cuts` takes off the states that were padded.
        """
        if not self.is_list:
            member = self.members[0]
            found = compute(*member.flat())
            if len(member.leading) == 1:
                return found
            shapes = ((*member.leading, *x.shape[1:]) for x in ((found,) if isinstance(found, Tensor) else found))
            if isinstance(found, Tensor):
                return found.reshape(next(shapes))
            return tuple(x.reshape(shape) for x, shape in zip(found, shapes, strict=True))
        results: list[Any] = [None] * len(self.members)
        for places, n, m, p in self._buckets():
            parts = [self.members[i].flat().padded(n, m, p) for i in places]
            whole = parts[0]
            if len(parts) > 1:
                whole = System(*map(torch.cat, zip(*parts, strict=True)))
            found = compute(*whole)
            outputs = (found,) if isinstance(found, Tensor) else found
            counts = [len(part.Lambda) for part in parts]
            for i, piece in zip(places, zip(*(x.split(counts) for x in outputs), strict=True), strict=True):
                member = self.members[i]
                shaped = tuple(x.reshape((*member.leading, *x.shape[1:])) for x in piece)
                if member.order != n:
                    shaped = (
                        tuple(cut(x, member.order) for cut, x in zip(cuts, shaped, strict=True)) if cuts else shaped
                    )
                results[i] = shaped[0] if isinstance(found, Tensor) else shaped
        return results

    def _buckets(self) -> Iterator[tuple[list[int], int, int, int]]:
        """Places of systems that go together, and the sizes they are padded to."""
        buckets: dict[Any, list[int]] = {}
        for i, member in enumerate(self.members):
            buckets.setdefault((rounded(member.order), member.B.dtype, member.B.device), []).append(i)
        for places in buckets.values():
            members = [self.members[i] for i in places]
            sizes = ((x.order, x.B.shape[-1], x.C.shape[-2]) for x in members)
            n, m, p = (max(size) for size in zip(*sizes, strict=True))
            yield places, n, m, p

    def refuse_unstable(self) -> None:
        """Raise ValueError where some |λ| ≥ 1, and say where."""
        for i, member in enumerate(self.members):
            Lambda = member.Lambda.detach()
            wrong = (~inside(wide(Lambda)) & Lambda.isfinite()).nonzero()
            if len(wrong):
                place = tuple(wrong[0].tolist())
                name = f"Lambda[{i}]" if self.is_list else "Lambda"
                size = Lambda[place].abs().item()
                raise ValueError(f"{name} has |λ| = {size:.9g} at index {place}, but every |λ| must be below 1")


def rounded(n: int) -> int:
    """Orders that share a batch: padding costs at most as much as another batch would.

    Native's decomposition ends at 100 states, where a batch ends too: padding must not move a system across.
    """
    step = 4 if n <= 16 else 8 if n <= 64 else 20
    return -(-n // step) * step


def check(Lambda: Operand, B: Operand, C: Operand) -> Systems:
    """Systems with common leading dimensions and dtypes. Raises TypeError and ValueError that name the argument."""
    operands: dict[str, Any] = dict(zip(NAMES, (Lambda, B, C), strict=True))
    lists = [name for name, value in operands.items() if isinstance(value, (list, tuple))]
    if not lists:
        return Systems([one(operands, None)], False)
    for name, value in operands.items():
        if name not in lists:
            check_tensor(name, value, backends.REAL_OR_COMPLEX)
            raise TypeError(f"{name} is Tensor, but must be a list, as {lists[0]} is")
        if len(value) != len(operands[lists[0]]):
            raise ValueError(
                f"{name} has {len(value)} systems, but must have {len(operands[lists[0]])}, as in {lists[0]}"
            )
    triples = zip(*operands.values(), strict=True)
    return Systems([one(dict(zip(NAMES, x, strict=True)), i) for i, x in enumerate(triples)], True)


def one(operands: dict[str, Any], index: int | None) -> System:
    """A checked system."""
    tensors = [operands[name] for name in NAMES]

    def decide() -> tuple[torch.dtype, tuple[tuple[int, ...], ...]]:
        leading = CONTRACT.bind(operands, index=index)["*"]
        dtype = torch.promote_types(torch.promote_types(tensors[0].dtype, tensors[1].dtype), tensors[2].dtype)
        own = (x.shape[-1:] if i == 0 else x.shape[-2:] for i, x in enumerate(tensors))
        return dtype, tuple((*leading, *shape) for shape in own)

    dtype, shapes = PLANS.find(tensors, (), decide)
    same = (
        x if x.dtype is dtype and x.shape == shape else x.to(dtype).expand(shape)
        for x, shape in zip(tensors, shapes, strict=True)
    )
    return System(*same)
