"""What was derived from tensors that do not change, kept until they do.

A value is found again only for the same place in the memory of the same tensor (or of the tensor it is a view of), and
only while every byte there is what it was. Version counters would not do: an edit through `.data` (an EMA update, say)
leaves them alone. Reading the bytes costs one pass, where deriving costs thousands of FLOPs a byte.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

# What is kept at most; the least recently used goes first.
CAPACITY_BYTES = 512 << 20
CAPACITY_VALUES = 256


def _owner(x: Tensor) -> Tensor:
    """The tensor that lives as long as the memory is the caller's: operators flatten, and views come and go."""
    return x if x._base is None else x._base


def _place(x: Tensor) -> tuple[Any, ...]:
    return id(_owner(x)), x.data_ptr(), x.shape, x.stride(), x.dtype


class Derived:
    """A small memory of values derived from tensors; each value is a tuple of tensors, and may carry a note.

    An `anchor` is a derived tensor that a value belongs to: known by identity, since nobody else writes to it.
    """

    def __init__(self, fingerprint: Callable[[Tensor], int]) -> None:
        self._fingerprint = fingerprint
        self._entries: OrderedDict[Hashable, tuple[list[Any], list[int], tuple[Tensor, ...], Any]] = OrderedDict()

    def find(
        self, tensors: Sequence[Tensor | None], kind: Hashable, anchor: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Any] | None:
        """The value of this kind and its note, or None when there is none or a tensor has changed."""
        present = [x for x in tensors if x is not None]
        key = (kind, id(anchor), *map(_place, present))
        entry = self._entries.get(key)
        if entry is None:
            return None
        owners, fingerprints, value, note = entry
        same_tensors = all(owner() is _owner(x) for owner, x in zip(owners, present, strict=False))
        if not same_tensors or fingerprints != [self._fingerprint(x) for x in present]:
            self._entries.pop(key, None)
            return None
        self._entries.move_to_end(key)
        return value, note

    def keep(
        self,
        tensors: Sequence[Tensor | None],
        kind: Hashable,
        value: tuple[Tensor, ...],
        note: Any = None,
        anchor: Tensor | None = None,
    ) -> None:
        """Keep a value until one of its tensors changes or is gone."""
        present = [x for x in tensors if x is not None]
        key = (kind, id(anchor), *map(_place, present))
        sources = [_owner(x) for x in present] + ([] if anchor is None else [anchor])
        owners = [weakref.ref(x, lambda _: self._entries.pop(key, None)) for x in sources]
        self._entries[key] = (owners, [self._fingerprint(x) for x in present], value, note)
        while len(self._entries) > 1 and (len(self._entries) > CAPACITY_VALUES or self._bytes() > CAPACITY_BYTES):
            self._entries.popitem(last=False)

    def _bytes(self) -> int:
        return sum(x.nbytes for _, _, value, _ in list(self._entries.values()) for x in value)
