"""Numbers on the command line."""

import argparse
from collections.abc import Callable
from typing import Any

MOST = {int: 2**31 - 1, float: 3.4e38}  # what torch's options and float32 hold
MOST_THREADS = 1024


def number(
    kind: Callable[[str], float], least: float, above: bool = False, most: float | None = None
) -> Callable[[str], Any]:
    """Parses a number of at least `least`, or above it, and at most `most`."""
    most = MOST[kind] if most is None else most  # type: ignore[index]

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of the kind {kind.__name__}") from None
        if not (value > least if above else value >= least):
            bound = "above" if above else "at least"
            raise argparse.ArgumentTypeError(f"{text} is too small, must be {bound} {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is too large, must be at most {most:g}")
        return value

    return parse


threads = number(int, 1, most=MOST_THREADS)


def fraction(text: str) -> float:
    """At least 0 and below 1."""
    value = number(float, 0.0)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is too large, must be below 1")
    return value
