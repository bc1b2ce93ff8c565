"""What was derived from tensors that do not change, kept until they do.

A value is found again only for the very same tensor objects at the same version and the same place in memory. Edits
through `.data` (an EMA update, say) leave the version alone: one element of every row is compared as well.
"""

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CAPACITY = 512 << 20  # bytes of derived values kept at most; the least recently used go first


@dataclass
class _Witness:
    """What a tensor looked like when something was derived from it."""

    ref: weakref.ref[Tensor]
    state: tuple[Any, ...]
    rows: Tensor
    cols: Tensor
    sample: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "_Witness":
        matrix = x.detach().reshape(x.shape[0], -1)
        rows = torch.arange(matrix.shape[0], device=x.device)
        cols = rows * 7919 % max(matrix.shape[1], 1)
        return cls(weakref.ref(x), _state(x), rows, cols, matrix[rows, cols])

    def holds(self, x: Tensor) -> bool:
        if self.ref() is not x or self.state != _state(x):
            return False
        return torch.equal(self.sample, x.detach().reshape(x.shape[0], -1)[self.rows, self.cols])


def _state(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x._version, x.shape, x.stride(), x.dtype


class Derived:
    """A small memory of values derived from tensors, least recently used first out."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, tuple[tuple[_Witness | None, ...], Tensor, Any]] = OrderedDict()

    @staticmethod
    def _key(tensors: Sequence[Tensor | None], extra: Hashable) -> Hashable:
        return tuple(None if x is None else id(x) for x in tensors), extra

    def find(self, tensors: Sequence[Tensor | None], extra: Hashable) -> tuple[Tensor, Any] | None:
        """(value, note) as kept for these tensors, or None when there is none or a tensor has changed."""
        key = self._key(tensors, extra)
        entry = self._entries.get(key)
        if entry is None:
            return None
        for witness, x in zip(entry[0], tensors, strict=True):
            if witness is not None and not witness.holds(x):  # type: ignore[arg-type]
                self._entries.pop(key, None)
                return None
        self._entries.move_to_end(key)
        return entry[1], entry[2]

    def keep(self, tensors: Sequence[Tensor | None], extra: Hashable, value: Tensor, note: Any = None) -> None:
        """Keep a value until one of its tensors changes or is gone. Inference tensors have no version: not kept."""
        if any(x is not None and x.is_inference() for x in tensors):
            return
        key = self._key(tensors, extra)
        witnesses = tuple(None if x is None else _Witness.of(x) for x in tensors)
        self._entries[key] = (witnesses, value, note)
        for x in tensors:
            if x is not None:
                weakref.finalize(x, self._entries.pop, key, None)
        while self._bytes() > CAPACITY and len(self._entries) > 1:
            self._entries.popitem(last=False)

    def _bytes(self) -> int:
        return sum(value.nbytes for _, value, _ in self._entries.values())

    def clear(self) -> None:
        self._entries.clear()
