"""What a run of `whisper` depends on. Two runs with equal configs on one machine give the same bits."""

import dataclasses

from kdtrainer.recipe import RunConfig


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Every field is kept in each checkpoint; a resumed run must have the same."""

    seed: int = 0
    students: int = 1  # on one base, with adapters of their own
    train: int = 400  # utterances
    test: int = 40
    seconds: int = 8  # that are heard of each, instead of 30
    layers: int = 3  # of the student's encoder, and of its decoder
    lora_ranks: tuple[int, ...] = (6,)  # of the adapters, one for each student in turn
    dropout: float = 0.1
    dimension: int = 1280  # D
    alignment_weight: float = 1.0
    soft_targets: float = 1.0
    hard_labels: float = 1.0  # the sentences themselves
    steps: int = 300
    batch: int = 8
    rate: float = 1e-3
    backend: str = "auto"
    threads: int = 2

    def rank_of(self, student: int) -> int:
        return self.lora_ranks[student % len(self.lora_ranks)]


QUICK: dict[str, int] = {"train": 40, "test": 6, "steps": 30}
