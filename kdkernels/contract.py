"""Shapes are declared, not checked line by line.

A `Contract` names each tensor argument and spells its shape in letters, as the docstring does::

    Contract(student="... d_s", student_proj="D d_s", weights="...")

A `?` behind the shape says that the argument may be None. `bind` gives every letter its size, and where an argument
does not fit it raises an error that names the argument, what it was and what it must be. Leading dimensions spelled
`...` must be the same in every argument; those spelled `*` broadcast. Tensors are real unless the contract lists its
dtypes.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

LEADING = "..."
BROADCAST = "*"


class Contract:
    """Named tensor arguments and their shapes, spelled in letters; `...` or `*` stands for all leading dimensions."""

    def __init__(self, dtypes: tuple[torch.dtype, ...] = (), /, **shapes: str) -> None:
        self.dtypes = dtypes
        self.shapes = {name: tuple(spec.removesuffix("?").split()) for name, spec in shapes.items()}
        self.optional = {name for name, spec in shapes.items() if spec.endswith("?")}

    def bind(
        self, tensors: Mapping[str, Tensor | None], same: Mapping[str, str] | None = None, index: int | None = None
    ) -> dict[str, Any]:
        """Return the size of each letter (and the tuple behind `...` or `*`).

        `same` says that one letter equals another (`{"d_s": "D"}` when there is no projection); `index` is the place
        of these tensors in lists of arguments, which errors then name (`B[3]`).

        Raises TypeError for an argument that is no tensor of a dtype that is served, ValueError for a shape or device
        that does not fit.
        """
        sizes: dict[str, Any] = {}
        owner: dict[str, str] = {}
        first: tuple[str, torch.device] | None = None
        for name, spec in self.shapes.items():
            tensor = tensors.get(name)
            if tensor is None and name in self.optional:
                continue
            if index is not None:
                name = f"{name}[{index}]"
            check_tensor(name, tensor, self.dtypes)
            assert tensor is not None
            if first is None:
                first = (name, tensor.device)
            elif tensor.device != first[1]:
                raise ValueError(f"{name} is on {tensor.device}, but {first[0]} is on {first[1]}: one device, please")
            letters = tuple((same or {}).get(letter, letter) for letter in spec)
            self._bind_one(name, tensor, letters, sizes, owner)
        return sizes

    @staticmethod
    def _bind_one(
        name: str, tensor: Tensor, letters: tuple[str, ...], sizes: dict[str, Any], owner: dict[str, str]
    ) -> None:
        shape = tuple(tensor.shape)
        named = letters[1:] if letters[0] in (LEADING, BROADCAST) else letters
        wanted = f"({', '.join(LEADING if letter == BROADCAST else letter for letter in letters)})"
        if len(shape) < len(named) or (named is letters and len(shape) != len(named)):
            raise ValueError(f"{name} has shape {show(shape)}, but must be {wanted}")
        split = len(shape) - len(named)
        parts: list[tuple[str, Any]] = [(letters[0], shape[:split])] if named is not letters else []
        parts += zip(named, shape[split:], strict=True)
        for letter, size in parts:
            if letter not in sizes:
                sizes[letter], owner[letter] = size, name
            elif letter == BROADCAST:
                sizes[letter] = broadcast(sizes[letter], size, name, owner[letter])
            elif sizes[letter] != size:
                known = show(sizes[letter]) if letter == LEADING else sizes[letter]
                raise ValueError(
                    f"{name} has shape {show(shape)}, but must be {wanted} with {letter} = {known}, "
                    f"as in {owner[letter]}"
                )


def broadcast(a: tuple[Any, ...], b: tuple[Any, ...], name: str, other: str) -> tuple[Any, ...]:
    """The shape that leading dimensions have in common. Raises ValueError, naming both arguments, if there is none."""
    length = max(len(a), len(b))
    pairs = zip((1,) * (length - len(a)) + a, (1,) * (length - len(b)) + b, strict=True)
    common = []
    for x, y in pairs:
        if x != y and x != 1 and y != 1:
            raise ValueError(
                f"{name} has leading dimensions {show(b)}, but they must broadcast with {show(a)}, as in {other}"
            )
        common.append(y if x == 1 else x)
    return tuple(common)


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    """Raise TypeError unless `value` is a dense tensor of one of `dtypes`; without them, of real floating point."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, but must be a torch.Tensor")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}, but must have one of {', '.join(map(str, dtypes))}")
    if not dtypes and not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, but must be a floating-point tensor")
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor, but must be dense: pad it first")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}, but must be dense (torch.strided)")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}")


def is_whole(value: object) -> TypeGuard[int]:
    """An integer, NumPy's included, that is no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if not (is_whole(value) and value >= 1):
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least 1")


def check_number(name: str, value: object) -> None:
    """Raise unless `value` is a number of at least 0, NumPy's included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {type(value).__name__}, but must be a number")
    if not float(value) >= 0:
        raise ValueError(f"{name} is {value}, but must be at least 0")


def resolved(x: Tensor) -> Tensor:
    """The tensor as it lies in memory, where kernels read it: torch keeps some signs, and some zeros, elsewhere."""
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return x.resolve_conj().resolve_neg() if x.is_complex() else x.resolve_neg()


def readable(x: Any) -> Any:
    """A tensor as it lies in memory, and contiguous; None stays None."""
    return None if x is None else resolved(x).contiguous()


def autocast_dtype(x: Any) -> torch.dtype | None:
    """What autocast would have `torch.nn.functional.linear` make of x on its device, if it is enabled there."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, Tensor):
        return None
    device = x.device.type
    return None if device == "meta" or not torch.is_autocast_enabled(device) else torch.get_autocast_dtype(device)


def without_autocast(x: Tensor | None = None) -> AbstractContextManager[Any]:
    """On the device of x, or on the CPU, for kernels: dtypes were settled before, and a backward may run under another
    autocast."""
    if x is not None:
        return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
    return torch.autocast("cpu", enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()


def show(shape: tuple[Any, ...]) -> str:
    """A shape as a person writes it: `(8, 3)`, `(3)`, `()`."""
    return f"({', '.join(str(size) for size in shape)})"
