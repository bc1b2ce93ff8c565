"""Checks of constructor arguments that several modules take."""

from numbers import Integral
from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """An integer, NumPy's included, that is no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if not (is_whole(value) and value >= 1):
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least 1")
