"""Whether the accelerated backend trains the same student as the reference: both whole runs, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deviation:
    """The largest differences over a whole run, both relative to the reference."""

    loss: float  # max over steps of |L - L_ref| / |L_ref|
    weights: float  # ‖W - W_ref‖ / ‖W_ref‖, all of the student's final weights as one vector
    budget: float

    @property
    def within_budget(self) -> bool:
        return self.loss <= self.budget and self.weights <= self.budget  # False for NaN

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"within_budget": self.within_budget}


def deviation(
    losses: Sequence[float],
    reference_losses: Sequence[float],
    weights: Mapping[str, Tensor],
    reference_weights: Mapping[str, Tensor],
    budget: float,
) -> Deviation:
    """Losses of every step and final weights of a run, against those of the reference."""
    ours, theirs = (torch.tensor(x, dtype=torch.float64) for x in (losses, reference_losses))  # (steps,)
    relative = (ours - theirs).abs() / theirs.abs()
    names = sorted(reference_weights)
    w, w_ref = (torch.cat([x[name].double().flatten() for name in names]) for x in (weights, reference_weights))
    return Deviation(relative.max().item(), ((w - w_ref).norm() / w_ref.norm()).item(), budget)
