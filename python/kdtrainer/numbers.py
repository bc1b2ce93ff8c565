"""Numbers on the command line."""

import argparse
from collections.abc import Callable
from math import inf
from typing import Any


def number(kind: Callable[[str], float], least: float, above: bool = False) -> Callable[[str], Any]:
    """Parses a finite number of at least `least`, or above it."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of the kind {kind.__name__}") from None
        if not (value > least if above else value >= least):
            bound = "above" if above else "at least"
            raise argparse.ArgumentTypeError(f"{text} is too small, must be {bound} {least}")
        if value == inf:
            raise argparse.ArgumentTypeError(f"{text} is too large, must be finite")
        return value

    return parse


def fraction(text: str) -> float:
    """At least 0 and below 1."""
    value = number(float, 0.0)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is too large, must be below 1")
    return value
