"""What a run of `subspace` depends on. Two runs with equal configs on one machine give the same bits."""

import dataclasses
from typing import Any

from kdtrainer.recipe import RunConfig

IMAGE_TEACHERS, TEXT_TEACHERS = ("cnn", "vit"), ("minilm",)
TEACHERS = IMAGE_TEACHERS + TEXT_TEACHERS
WORDNET = "wordnet"
RATIOS = (1, 2, 4, 8, 16, 32)  # d/k
PROJECTIONS = ("johnson_lindenstrauss", "pca", "learned")
FULL = "full"


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Every field is kept in each checkpoint; a resumed run must have the same."""

    data: str = "digits"
    teachers: tuple[str, ...] = IMAGE_TEACHERS
    seed: int = 0
    features: int = 512  # d of the teachers that are trained here
    ratio: int = 16  # d/k of the student
    projection: str = "johnson_lindenstrauss"  # of the student's space
    labels: int = 10  # labelled examples per class that the student sees
    examples: int = 0  # to train on, at most; 0: all
    teacher_steps: int = 500
    head_steps: int = 400
    steps: int = 500  # of every student
    alignment_weight: float = 10.0  # beside labels
    soft_targets: float = 1.0  # likewise
    temperature: float = 2.0
    backend: str = "auto"  # once a run has started: the one that `auto` became
    threads: int = 2


SEEDS, QUICK_SEEDS = 5, 2
QUICK: dict[str, Any] = {"examples": 4000, "teacher_steps": 150, "head_steps": 150, "steps": 150}
