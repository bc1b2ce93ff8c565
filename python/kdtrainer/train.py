"""One training loop for teachers and students: resumable at any step, with the same bits."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from kdtrainer import checkpoint
from kdtrainer.checkpoint import AnyConfig, Progress
from kdtrainer.errors import Interrupted, RunError
from kdtrainer.metrics import MetricsLog
from kdtrainer.ranks import ALONE, Ranks

EVALUATE_EVERY = 20
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Task:
    """Something to train."""

    name: str
    steps: int
    learning_rate: float
    trained: nn.Module  # the model, and what is trained beside it
    draw: Callable[[], tuple[Tensor, ...]]  # from torch's generator: the examples of a step, kind by kind
    losses: Callable[..., dict[str, Tensor]]  # of these, or of a process's share of each: "loss" is minimised
    evaluate: Callable[[], dict[str, float]]  # what metrics.jsonl should know beside the losses


def drawn(*kinds: tuple[Tensor, int]) -> tuple[Tensor, ...]:
    """Of each kind: so many of the indices, or all, without repetition."""
    return tuple(indices[torch.randperm(len(indices))[:size]] for indices, size in kinds)


def cosine(share: float) -> float:
    """The share of the learning rate, by the share of the steps that were done."""
    return (1 + math.cos(math.pi * share)) / 2


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


def fit(
    task: Task,
    config: AnyConfig,
    path: Path,
    metrics: MetricsLog | None,
    checkpoint_every: int,
    on_step: Callable[[int, float | None], None],
    evaluate_every: int = EVALUATE_EVERY,
    *,
    schedule: Callable[[float], float] = cosine,
    largest_gradient: float = math.inf,
    interruptions: Callable[[], AbstractContextManager[Callable[[], bool]]] = interruptions,
    ranks: Ranks = ALONE,
) -> None:
    """Train `task` from the checkpoint at `path`, or from the start where there is none, to its last step.

    The processes of `ranks` share every batch; the leading one alone has `metrics` and writes.

    Raises RunError where the loss is no number, Interrupted after Ctrl-C.
    """
    trained = [p for p in task.trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.learning_rate, weight_decay=WEIGHT_DECAY)
    done = Progress(0, 0, 0.0)
    if path.exists():
        done = checkpoint.progress(path)
        checkpoint.restore(path, task.trained, optimizer)
        on_step(done.step, None)
    start = time.perf_counter() - done.seconds

    def write(step: int, losses: dict[str, float], stop: bool) -> None:
        assert metrics is not None
        record: dict[str, Any] = {"task": task.name, "step": step} | losses
        if step % evaluate_every == 0 or step == task.steps:
            record |= task.evaluate()
        metrics.append(record)
        if step % checkpoint_every == 0 or step == task.steps or stop:
            # Metrics first: a checkpoint never counts on a line that is not on the disk.
            progress = Progress(step, metrics.sync(), time.perf_counter() - start)
            checkpoint.save(path, task.trained, optimizer, config, progress)

    with interruptions() as interrupted:
        for step in range(done.step + 1, task.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = task.learning_rate * schedule((step - 1) / task.steps)
            shares = [ranks.share(indices) for indices in task.draw()]
            with ranks.own_chance():
                losses = task.losses(*shares)
            found = ranks.mean({name: value.item() for name, value in losses.items()})
            if not math.isfinite(found["loss"]):
                kept = f"the checkpoint in {path} is from before" if path.exists() else "there is no checkpoint"
                raise RunError(f"{task.name}, step {step}: the loss is {found['loss']}; {kept}")
            optimizer.zero_grad()
            losses["loss"].backward()
            ranks.average(p.grad for p in trained if p.grad is not None)
            if largest_gradient < math.inf:
                nn.utils.clip_grad_norm_(trained, largest_gradient)
            optimizer.step()

            stop = any(ranks.gather(interrupted()))
            ranks.led(partial(write, step, found, stop))
            on_step(step, found["loss"])
            if stop:
                raise Interrupted
    ranks.check_equal(task.trained)  # and none looks for the checkpoint before it is there
