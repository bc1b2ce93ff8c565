"""What a run of `compress` depends on. Two runs with equal configs on one machine give the same bits."""

import dataclasses
from math import cos, pi

from kdtrainer.recipe import RunConfig

COMPRESSED, UNCOMPRESSED, SMALL, POSTHOC = "compressed", "uncompressed", "small", "posthoc"
PRUNED = ("random", "smallest", "modal")  # the same sizes at the same steps, by keeping states as they are
BASELINES = (UNCOMPRESSED, SMALL, *PRUNED, POSTHOC)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Every field is kept in each checkpoint; a resumed run must have the same."""

    data: str = "digits"
    length: int = 784  # of a digit as a sequence
    seed: int = 0
    states: int = 256
    features: int = 8
    blocks: int = 1
    dropout: float = 0.1
    min_radius: float = 0.9
    max_radius: float = 0.999
    steps: int = 1000
    batch: int = 50
    learning_rate: float = 2e-2
    ssm_rate_factor: float = 0.25  # of the layers' own parameters
    weight_decay: float = 0.05  # of all others
    warm_up: float = 0.1  # share of the steps
    tolerance: float | None = 0.01  # of these three one is not None
    error: float | None = None
    ranks: int | None = None
    reductions: int = 4
    reduction_share: float = 0.1  # of the steps, within which they are
    moments: str = "transport"
    hsv_regularizer: str | None = None
    hsv_weight: float = 0.0
    threads: int = 2
    device: str = "cpu"

    def rate(self, step: int) -> float:
        """The share of the learning rate in a step, from 1: a linear rise, then half a cosine."""
        rising = max(round(self.warm_up * self.steps), 1)
        if step <= rising:
            return step / rising
        return (1 + cos(pi * (step - rising) / max(self.steps - rising, 1))) / 2

    def reduction_steps(self) -> list[int]:
        """The steps after which states may go: equidistant, the last at the end of the share."""
        within = self.reduction_share * self.steps
        return sorted({max(round(within * (k + 1) / self.reductions), 1) for k in range(self.reductions)})


QUICK: dict[str, int] = {"length": 64, "states": 64, "steps": 400}
