"""One training loop for teachers and students: resumable at any step, with the same bits."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from kdtrainer import checkpoint
from kdtrainer.checkpoint import AnyConfig, Progress
from kdtrainer.metrics import MetricsLog

EVALUATE_EVERY = 20
WEIGHT_DECAY = 0.01


class Interrupted(Exception):
    """Ctrl-C, after the step was finished and its checkpoint written."""


@dataclass(frozen=True)
class Task:
    """Something to train: `losses` draws its batch from torch's generator, and its "loss" is minimised."""

    name: str
    steps: int
    learning_rate: float
    trained: nn.Module  # the model, and what is trained beside it
    losses: Callable[[], dict[str, Tensor]]
    evaluate: Callable[[], dict[str, float]]  # what metrics.jsonl should know beside the losses


def fit(
    task: Task,
    config: AnyConfig,
    path: Path,
    metrics: MetricsLog,
    checkpoint_every: int,
    on_step: Callable[[int, float | None], None],
    evaluate_every: int = EVALUATE_EVERY,
) -> None:
    """Train `task` from the checkpoint at `path`, or from the start where there is none, to its last step."""
    trained = [p for p in task.trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.learning_rate, weight_decay=WEIGHT_DECAY)
    done = Progress(0, 0, 0.0)
    if path.exists():
        done = checkpoint.progress(path)
        checkpoint.restore(path, task.trained, optimizer)
        on_step(done.step, None)
    start = time.perf_counter() - done.seconds
    with interruptions() as interrupted:
        for step in range(done.step + 1, task.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = task.learning_rate * (1 + math.cos(math.pi * (step - 1) / task.steps)) / 2
            losses = task.losses()
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()

            record: dict[str, Any] = {"task": task.name, "step": step}
            record |= {name: value.item() for name, value in losses.items()}
            if step % evaluate_every == 0 or step == task.steps:
                record |= task.evaluate()
            metrics.append(record)
            stop = interrupted()
            if step % checkpoint_every == 0 or step == task.steps or stop:
                # Metrics first: a checkpoint never counts on a line that is not on the disk.
                progress = Progress(step, metrics.sync(), time.perf_counter() - start)
                checkpoint.save(path, task.trained, optimizer, config, progress)
            on_step(step, record["loss"])
            if stop:
                raise Interrupted


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Within the block, a first Ctrl-C only makes the yielded function say True; a second one is as ever."""
    came = False
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)
