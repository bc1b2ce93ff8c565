"""Shapes are declared, not checked line by line.

A `Contract` names each tensor argument and spells its shape in letters, as the docstring does::

    Contract(student="... d_s", student_proj="D d_s", weights="...")

`bind` gives every letter its size, and where an argument does not fit it raises an error that names the
argument, what it was and what it must be.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LEADING = "..."


class Contract:
    """Named tensor arguments and their shapes, spelled in letters; `...` stands for all leading dimensions."""

    def __init__(self, **shapes: str) -> None:
        self.shapes = {name: tuple(spec.split()) for name, spec in shapes.items()}

    def bind(self, tensors: Mapping[str, Tensor | None], same: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the size of each letter (and the tuple behind `...`).

        `same` says that one letter equals another (`{"d_s": "D"}` when there is no projection).

        Raises TypeError for an argument that is no floating-point tensor, ValueError for a shape or device that
        does not fit.
        """
        sizes: dict[str, Any] = {}
        owner: dict[str, str] = {}
        first: tuple[str, torch.device] | None = None
        for name, spec in self.shapes.items():
            tensor = tensors.get(name)
            if tensor is None:
                continue
            check_tensor(name, tensor)
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
        named = letters[1:] if letters[:1] == (LEADING,) else letters
        wanted = f"({', '.join(letters)})"
        if len(shape) < len(named) or (named is letters and len(shape) != len(named)):
            raise ValueError(f"{name} has shape {show(shape)}, but must be {wanted}")
        split = len(shape) - len(named)
        parts: list[tuple[str, Any]] = [(LEADING, shape[:split])] if named is not letters else []
        parts += zip(named, shape[split:], strict=True)
        for letter, size in parts:
            if letter not in sizes:
                sizes[letter], owner[letter] = size, name
            elif sizes[letter] != size:
                known = show(sizes[letter]) if letter == LEADING else sizes[letter]
                raise ValueError(
                    f"{name} has shape {show(shape)}, but must be {wanted} with {letter} = {known}, "
                    f"as in {owner[letter]}"
                )


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a dense tensor of real floating-point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, but must be a torch.Tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, but must be a floating-point tensor")
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor, but must be dense: pad it first")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}, but must be dense (torch.strided)")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}")


def show(shape: tuple[Any, ...]) -> str:
    """A shape as a person writes it: `(8, 3)`, `(3)`, `()`."""
    return f"({', '.join(str(size) for size in shape)})"
