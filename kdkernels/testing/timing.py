"""Variants timed side by side: in each round every variant takes a turn, so that a slow minute slows all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from kdkernels.testing.rates import timed

MIN_ROUNDS = 3


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    refresh: Callable[[], Any],
    device: str,
    *,
    seconds: float,
    max_rounds: int = 50,
) -> dict[str, list[float]]:
    """Seconds of every round of each variant; `refresh` runs untimed before each step.

    A turn is two steps, of which the second is timed: what the variant before it left in caches, and gave back to the
    system of its memory, is not its own cost. Stops after `seconds`, but not before three rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    for round_ in range(1, max_rounds + 1):
        for name, step in variants.items():
            refresh()
            step()
            refresh()
            times[name].append(timed(step, device))
        if round_ >= MIN_ROUNDS and time.perf_counter() - start >= seconds:
            break
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each variant."""
    return {name: median(seconds) for name, seconds in times.items()}
