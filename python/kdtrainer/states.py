"""Hidden states as alignment takes them."""

from collections.abc import Sequence

from torch import Tensor


def standardised(states: Sequence[Tensor]) -> list[Tensor]:
    """Mean 0 per feature, and mean square 1 over all of them.

    What all images have in common says nothing about any of them, but would dominate cosine and mse alike.
    """
    centred = [state - state.mean(0) for state in states]
    return [state / state.square().mean().sqrt() for state in centred]
