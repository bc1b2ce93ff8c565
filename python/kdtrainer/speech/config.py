"""What a run of `speech` depends on. Two runs with equal configs on one machine give the same bits."""

import dataclasses
import zlib

from kdtrainer.recipe import RunConfig

TEACHERS = ("convolutional", "transformer", "state-space", "recurrent")
DEFAULT_TEACHERS = TEACHERS[:3]
ALL, ONE = "all teachers", "one teacher"
MOST_SHARE = 0.01  # of the teachers' parameters, that a student may train


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Every field is kept in each checkpoint; a resumed run must have the same."""

    data: str | None = None  # a folder; None: espeak-ng's voice
    seed: int = 0  # of the utterances and the teachers
    student_seed: int = 0  # of the base, the labelled utterances, adapters, projections and batches
    teachers: tuple[str, ...] = DEFAULT_TEACHERS
    train: int = 1000  # utterances
    test: int = 300
    clean: int = 300  # for the base
    labels: int = 100  # utterances of `train` whose text the student sees
    teacher_steps: int = 300
    base_steps: int = 200
    steps: int = 250  # of every student
    batch: int = 24  # of teachers and base; of the utterances that a student hears without text
    labelled_batch: int = 8
    teacher_rate: float = 3e-3
    rate: float = 2e-2  # of the adapters
    lora_rank: int = 4
    embedding_width: int = 12  # D
    alignment_weight: float = 1.0
    soft_targets: float = 1.0
    temperature: float = 4.0
    backend: str = "auto"  # once a run has started: the one that `auto` became
    threads: int = 1

    def seed_of(self, name: str) -> int:
        """Of a part of the run, which differs between students too."""
        return zlib.crc32(f"{self.seed}/{self.student_seed}/{name}".encode())


SEEDS, QUICK_SEEDS = 3, 1
QUICK: dict[str, int] = {
    "train": 250, "test": 100, "clean": 150, "labels": 50, "teacher_steps": 60, "base_steps": 60, "steps": 30,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a student learns beside the CTC loss of its labelled utterances, of all utterances."""

    soft_targets: bool = False
    metric: str | None = None  # of the alignment; None: there is none
    projector: str = "linear"  # or mlp, or none
    teachers: str = ALL

    def meaning(self) -> str:
        parts = []
        if self.metric and self.projector == "none":
            parts.append("hidden states as they are, mse")
        elif self.metric:
            parts.append(f"alignment, {self.metric}, {self.projector} projector")
        if self.soft_targets:
            parts.append("soft targets")
        return f"{' and '.join(parts)}; {self.teachers}" if parts else "labels alone, no distillation"


LABELS = "labels"
LESSONS = {
    LABELS: Lesson(),
    "soft": Lesson(True),
    "soft-one": Lesson(True, teachers=ONE),
    "hidden-mse-one": Lesson(metric="mse", projector="none", teachers=ONE),
    "mse": Lesson(metric="mse"),
    "cosine": Lesson(metric="cosine"),
    "angular": Lesson(metric="angular"),
    "cosine-mlp": Lesson(metric="cosine", projector="mlp"),
    "cosine-one": Lesson(metric="cosine", teachers=ONE),
    "both": Lesson(True, "cosine"),
    "both-one": Lesson(True, "cosine", teachers=ONE),
}
