"""`python -m kdtrainer whisper-step`: one distillation step by plain PyTorch and PEFT, and by kdkernels."""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from kdkernels.integrations.peft import accelerate
from kdtrainer.compare import Deviation, deviation
from kdtrainer.config import PHASES, StepConfig
from kdtrainer.errors import RunError
from kdtrainer.progress import ProgressBar, progress_bar
from kdtrainer.whisper import cohort, step_report
from kdtrainer.whisper import pair as whisper

EAGER, OURS = "eager + PEFT", "kdkernels"
CHECKED_STEPS = 2  # without dropout; the second loss depends on the first step's gradients. They warm up, too
TEMPERATURE = 2.0
RATE = 1e-3


@dataclass
class Way:
    """One of the two implementations, with weights of its own."""

    pair: whisper.Pair
    optimizer: torch.optim.Optimizer
    soft_targets: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    checked_parts: list[dict[str, float]] = field(default_factory=list)  # of each checked step's loss
    losses: list[float] = field(default_factory=list)  # of the timed steps
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})

    def checked_losses(self) -> list[float]:
        return [sum(parts.values()) for parts in self.checked_parts]

    def totals(self) -> list[float]:
        """Seconds of each timed step."""
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


class Stopwatch:
    """Seconds of the phases of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now


def run(config: StepConfig, out: Path, as_json: bool, shape: whisper.Shape | None = None) -> bool:
    """False when the checked steps' losses or weights are further apart than the budget. RunError: no start."""
    shape = shape or whisper.TINY_EN
    if config.threads:
        torch.set_num_threads(config.threads)
    ways, left = both_ways(config, shape)
    with progress_bar() as bar:
        show = bar.task(shape.name, CHECKED_STEPS + config.steps)
        for way in ways.values():
            way.pair.set_dropout(0.0)
        for step in range(CHECKED_STEPS + config.steps):
            if step == CHECKED_STEPS:
                found = deviation_of(ways, config.budget)
                for way in ways.values():
                    way.pair.set_dropout(shape.dropout)
            batch = whisper.batch(shape, config.batch, config.seed + step)
            for way in ways.values():
                torch.manual_seed(config.seed + step)  # of the masks
                parts, seconds = train(way, batch)
                loss = sum(parts.values())
                if step < CHECKED_STEPS:
                    way.checked_parts.append(parts)
                    continue
                way.losses.append(loss)
                for phase in PHASES:
                    way.seconds[phase].append(seconds[phase])
            show(step + 1, loss)
        told, within_budget = summary(config, shape, ways, left, found), found.within_budget
        if config.students > 1:
            timed, found = students_together(config, shape, ways[OURS].pair, bar)
            told["students"] = timed | found.as_json()
            within_budget = within_budget and found.within_budget
    step_report.finish(told, out, as_json)
    return within_budget


def both_ways(config: StepConfig, shape: whisper.Shape) -> tuple[dict[str, Way], list[str]]:
    """Each with the same weights, and the adapter layers that kdkernels leaves to PEFT, with the reason."""
    point, projection = torch.empty(1, 2), torch.empty(3, 2)
    explained = kd.explain(kd.projection_alignment_loss, point, point, projection, projection)
    if explained.backend == "reference":
        raise RunError(f"there is nothing to compare: only the reference serves here\n{explained}")
    eager = whisper.build(shape, config.dimension, config.seed)
    ours = whisper.Pair(eager.teacher, *deepcopy((eager.student, eager.aligner)))
    ours.aligner.backend = "auto"
    layers = accelerate(ours.student).report().layers
    ways = {
        name: Way(pair, torch.optim.AdamW(pair.trained().values(), lr=RATE), soft_targets)
        for name, pair, soft_targets in ((EAGER, eager, soft_targets_of_logits), (OURS, ours, soft_targets_of_states))
    }
    return ways, [f"{layer.name}: {layer.reason}" for layer in layers if not layer.served]


def train(way: Way, batch: whisper.Batch) -> tuple[dict[str, float], dict[str, float]]:
    """One step: the two parts of its loss, and the seconds of each phase.

    Each loss is differentiated down to the student's states at once, and the sum from there on: the same gradients as
    those of one `backward`, and each part's time can be told. The heads belong to the soft targets: one way makes
    their logits, the other never has them all.
    """
    pair, adapted, watch = way.pair, way.pair.adapted(), Stopwatch()
    with torch.no_grad():
        teacher = whisper.states(pair.teacher, batch)
    watch.lap("teacher forward")
    student = whisper.states(adapted, batch)
    watch.lap("student forward")
    encoder, decoder = (state.detach().requires_grad_() for state in student)
    alignment = pair.aligner([encoder], [teacher.encoder])
    alignment.backward()
    watch.lap("alignment")
    targets = way.soft_targets(decoder, whisper.head(adapted), teacher.decoder, whisper.head(pair.teacher))
    targets.backward()
    watch.lap("soft targets")
    torch.autograd.backward(student, [encoder.grad, decoder.grad])
    watch.lap("student backward")
    way.optimizer.step()
    way.optimizer.zero_grad()
    watch.lap("optimiser")
    return {"alignment": alignment.item(), "soft targets": targets.item()}, watch.seconds


def students_together(
    config: StepConfig, shape: whisper.Shape, pair: whisper.Pair, bar: ProgressBar
) -> tuple[dict[str, Any], Deviation]:
    """Several of them by kdkernels, in turn and together."""

    def loss_of(pair: whisper.Pair, teacher: whisper.States, batch: whisper.Batch) -> Tensor:
        encoder, decoder = whisper.states(pair.adapted(), batch)
        targets = soft_targets_of_states(
            decoder, whisper.head(pair.adapted()), teacher.decoder, whisper.head(pair.teacher)
        )
        return pair.aligner([encoder], [teacher.encoder]) + targets

    def batches() -> Iterator[whisper.Batch]:
        show = bar.task(f"{config.students} students", config.steps + 1)
        for step in range(config.steps + 1):
            yield whisper.batch(shape, config.batch, config.seed + step)
            show(step + 1, None)

    return cohort.compared(pair, config, loss_of, RATE, batches())


def soft_targets_of_logits(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """T² KL(teacher ‖ student) at temperature T, the mean over tokens, in plain PyTorch.

    States are (batch, tokens, width), heads (vocabulary, width).
    """
    logits = F.linear(student, student_head), F.linear(teacher, teacher_head)  # (batch, tokens, vocabulary)
    ours, theirs = (F.log_softmax(x.flatten(0, -2) / TEMPERATURE, -1) for x in logits)
    return TEMPERATURE**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def soft_targets_of_states(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """The same by kdkernels."""
    return kd.linear_distillation_loss(student, student_head, teacher, teacher_head, temperature=TEMPERATURE)


def deviation_of(ways: dict[str, Way], budget: float) -> Deviation:
    """Of each part of the checked steps' losses, lest the larger hides the smaller, and of the trained weights."""
    ours, eager = ways[OURS], ways[EAGER]
    parts, parts_ref = ([x for parts in way.checked_parts for x in parts.values()] for way in (ours, eager))
    w, w_ref = ({name: p.detach() for name, p in way.pair.trained().items()} for way in (ours, eager))
    return deviation(parts, parts_ref, w, w_ref, budget)


def summary(
    config: StepConfig, shape: whisper.Shape, ways: dict[str, Way], left: list[str], found: Deviation
) -> dict[str, Any]:
    """Everything that is told, as it is written to report.json."""
    seconds = {
        name: {"step": median(way.totals())} | {phase: median(way.seconds[phase]) for phase in PHASES}
        for name, way in ways.items()
    }
    return {
        "config": vars(config) | {"threads": torch.get_num_threads()},
        "shape": vars(shape),
        "trained_parameters": sum(p.numel() for p in ways[OURS].pair.trained().values()),
        "left_to_peft": left,
        "median_seconds": seconds,
        "step_seconds": {name: way.totals() for name, way in ways.items()},
        "ratio": seconds[EAGER]["step"] / seconds[OURS]["step"],
        "losses": {name: way.losses for name, way in ways.items()},
        "checked_losses": {name: way.checked_losses() for name, way in ways.items()},
        "checked_parts": {name: way.checked_parts for name, way in ways.items()},
        "compare": found.as_json(),
    }
