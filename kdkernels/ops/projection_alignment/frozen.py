"""What was derived from tensors that do not change, kept until they do.

A value is found again only for the same memory of the same tensor (or of the tensor it is a view of) at the same
version. Edits through `.data` (an EMA update, say) leave the version alone: one element of every row is compared too.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CAPACITY = 512 << 20  # bytes of derived values kept at most; the least recently used go first


def _owner(x: Tensor) -> Tensor:
    """The tensor that lives as long as the memory is the caller's: operators flatten, and views come and go."""
    return x if x._base is None else x._base


def _place(x: Tensor) -> tuple[Any, ...]:
    return id(_owner(x)), x.data_ptr(), x.shape, x.stride(), x.dtype


@dataclass(frozen=True)
class _Witness:
    """What a tensor looked like when something was derived from it."""

    owner: weakref.ref[Tensor]
    version: int
    rows: Tensor
    cols: Tensor
    sample: Tensor

    @classmethod
    def of(cls, x: Tensor, forget: Callable[[object], None]) -> "_Witness":
        matrix = x.detach().reshape(x.shape[0], -1)
        rows = torch.arange(matrix.shape[0], device=x.device)
        cols = rows * 7919 % max(matrix.shape[1], 1)
        return cls(weakref.ref(_owner(x), forget), x._version, rows, cols, matrix[rows, cols])

    def holds(self, x: Tensor) -> bool:
        if self.owner() is not _owner(x) or self.version != x._version:
            return False
        return torch.equal(self.sample, x.detach().reshape(x.shape[0], -1)[self.rows, self.cols])


class Derived:
    """A small memory of values derived from tensors; each value may carry a note."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, tuple[list[_Witness], Tensor, Any]] = OrderedDict()

    def find(self, tensors: Sequence[Tensor | None], kind: Hashable) -> tuple[Tensor, Any] | None:
        """The value of this kind and its note, or None when there is none or a tensor has changed."""
        present = [x for x in tensors if x is not None]
        key = (kind, *map(_place, present))
        entry = self._entries.get(key)
        if entry is None:
            return None
        if not all(witness.holds(x) for witness, x in zip(entry[0], present, strict=True)):
            self._entries.pop(key, None)
            return None
        self._entries.move_to_end(key)
        return entry[1], entry[2]

    def keep(self, tensors: Sequence[Tensor | None], kind: Hashable, value: Tensor, note: Any = None) -> None:
        """Keep a value until one of its tensors changes or is gone. Inference tensors have no version: not kept."""
        present = [x for x in tensors if x is not None]
        if any(x.is_inference() for x in present):
            return
        key = (kind, *map(_place, present))
        self._entries[key] = ([_Witness.of(x, lambda _: self._entries.pop(key, None)) for x in present], value, note)
        while sum(kept.nbytes for _, kept, _ in list(self._entries.values())) > CAPACITY and len(self._entries) > 1:
            self._entries.popitem(last=False)
