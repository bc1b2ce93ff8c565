"""What a run depends on. Two runs with equal configs on one machine give the same bits."""

import dataclasses

from kdtrainer.recipe import RunConfig

TEACHERS = ("mlp", "cnn", "transformer")

# Of `--compare`. Backends round differently and training amplifies that. Measured against native on a CPU: default
# options, six seeds: loss 6e-7, weights 3e-6; every metric and method, one seed: loss 2e-6, weights 1.4e-5.
# LoRA of rank 4, three seeds and every metric: loss 4e-7, weights 9e-7. Soft targets of weight 1, alone and with the
# alignment, with and without LoRA, three seeds: loss 2e-6, weights 9e-7; forward_kl, reverse_kl and jsd, both mixtures.
BUDGET = 1e-4


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Every field is kept in each checkpoint; a resumed run must have the same."""

    seed: int = 0
    teachers: tuple[str, ...] = TEACHERS
    labels: int = 10  # labelled images per class that the student sees
    teacher_steps: int = 250
    steps: int = 500  # of every student
    metric: str = "mse"
    method: str = "auto"
    lora_rank: int = 0  # of the adapters through which alone the distilled student is trained; 0: all of it is
    backend: str = "auto"  # once a run has started: the one that `auto` became
    threads: int = 1
    embedding_width: int = 64
    alignment_weight: float = 10.0  # 0: nothing is aligned
    soft_targets: float = 0.0  # their weight; 0: none
    temperature: float = 2.0  # of the soft targets, like the two below
    divergence: str = "forward_kl"
    mixture: str = "arithmetic"  # of the teachers' distributions


PHASES = ("teacher forward", "student forward", "alignment", "soft targets", "student backward", "optimiser")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Of `whisper-step`."""

    seed: int = 0
    steps: int = 3  # timed
    batch: int = 4  # clips of 30 s
    dimension: int = 4096  # D
    threads: int = 0  # 0: as many as torch takes
    students: int = 1  # more: in turn and together, too
    budget: float = BUDGET
