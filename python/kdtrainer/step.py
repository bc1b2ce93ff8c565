"""`python -m kdtrainer whisper-step`: one distillation step by plain PyTorch and PEFT, and by kdkernels."""

import time
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
from kdtrainer import report, step_report, whisper
from kdtrainer.compare import Deviation, deviation
from kdtrainer.config import PHASES, StepConfig
from kdtrainer.errors import RunError

EAGER, OURS = "eager + PEFT", "kdkernels"
CHECKED_STEPS = 2  # without dropout; the second loss depends on the first step's gradients. They warm up, too
TEMPERATURE = 2.0
RATE = 1e-3


@dataclass
class Way:
    """One of the two implementations, with weights of its own."""

    pair: whisper.Pair
    optimizer: torch.optim.Optimizer
    checked_losses: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the timed steps
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})

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
    """False when the losses or weights of the checked steps are further apart than the budget. RunError: no start."""
    shape = shape or whisper.TINY_EN
    if config.threads:
        torch.set_num_threads(config.threads)
    ways, left = both_ways(config, shape)
    with report.progress_bar() as bar:
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
                loss, seconds = train(way, batch)
                (way.checked_losses if step < CHECKED_STEPS else way.losses).append(loss)
                if step >= CHECKED_STEPS:
                    for phase in PHASES:
                        way.seconds[phase].append(seconds[phase])
            show(step + 1, loss)
    step_report.publish(summary(config, shape, ways, left, found), out, as_json)
    return found.within_budget


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
        name: Way(pair, torch.optim.AdamW(pair.trained().values(), lr=RATE))
        for name, pair in ((EAGER, eager), (OURS, ours))
    }
    return ways, [f"{layer.name}: {layer.reason}" for layer in layers if not layer.served]


def train(way: Way, batch: whisper.Batch) -> tuple[float, dict[str, float]]:
    """One step: its loss, and the seconds of each phase.

    Each loss is differentiated down to the student's outputs at once, and the sum from there on: the same gradients as
    those of one `backward`, and each part's time can be told.
    """
    pair, watch = way.pair, Stopwatch()
    inputs = {"input_features": batch.features, "decoder_input_ids": batch.tokens}
    with torch.no_grad():
        teacher = pair.teacher(**inputs)
    watch.lap("teacher forward")
    student = pair.student(**inputs)
    watch.lap("student forward")
    state = student.encoder_last_hidden_state.detach().requires_grad_()  # (batch, points, width)
    alignment = pair.aligner([state], [teacher.encoder_last_hidden_state])
    alignment.backward()
    watch.lap("alignment")
    logits = student.logits.detach().requires_grad_()  # (batch, tokens, vocabulary)
    targets = soft_targets(logits, teacher.logits)
    targets.backward()
    watch.lap("soft targets")
    torch.autograd.backward([student.encoder_last_hidden_state, student.logits], [state.grad, logits.grad])
    watch.lap("student backward")
    way.optimizer.step()
    way.optimizer.zero_grad()
    watch.lap("optimiser")
    return alignment.item() + targets.item(), watch.seconds


def soft_targets(student: Tensor, teacher: Tensor) -> Tensor:
    """T² KL(teacher ‖ student) of a token's logits (..., V) at temperature T, the mean over tokens."""
    ours, theirs = (F.log_softmax(x.flatten(0, -2) / TEMPERATURE, -1) for x in (student, teacher))
    return TEMPERATURE**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def deviation_of(ways: dict[str, Way], budget: float) -> Deviation:
    """Of the checked steps' losses, and of the trained weights after them."""
    ours, eager = ways[OURS], ways[EAGER]
    w, w_ref = ({name: p.detach() for name, p in way.pair.trained().items()} for way in (ours, eager))
    return deviation(ours.checked_losses, eager.checked_losses, w, w_ref, budget)


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
        "checked_losses": {name: way.checked_losses for name, way in ways.items()},
        "compare": vars(found) | {"within_budget": found.within_budget},
        "versions": {"kdkernels": kd.__version__, "torch": torch.__version__},
    }
