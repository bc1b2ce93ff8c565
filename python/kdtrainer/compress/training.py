"""The training of one model, of which states may go on the way: resumable at any step, with the same bits."""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from kdkernels.nn import LRU, LRUClassifier
from kdtrainer import checkpoint
from kdtrainer.compress.config import Config
from kdtrainer.compress.sequences import Sequences
from kdtrainer.errors import RunError
from kdtrainer.metrics import MetricsLog
from kdtrainer.ranks import Ranks
from kdtrainer.train import Interrupted, interruptions

EVALUATED = 500  # sequences at a time


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where training stood. `seconds` of training include `reducing` and leave evaluation and checkpoints out."""

    step: int
    metrics_bytes: int
    seconds: float
    reducing: float  # seconds spent on states: deciding which go, and making the model smaller
    regularizing: float  # seconds that the regulariser and its gradient took
    states: list[int]  # of each layer, now
    reductions: list[dict[str, Any]]  # each that took place or was looked at: step, states, error bounds, conditions
    evaluations: list[dict[str, float]]  # step, seconds, accuracy, states


# From the model and its optimiser: which step, and what took place. None where nothing was to be done.
Reduce = Callable[[LRUClassifier, torch.optim.Optimizer, int], kd.nn.Truncation | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model to train: its sizes at the start, and how it loses states, if it does."""

    name: str
    states: list[int]
    reduce: Reduce | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished model."""

    task: str
    model: LRUClassifier
    progress: Progress
    spectra: dict[str, Tensor]  # Hankel singular values: "<step>.<layer>"

    @property
    def accuracy(self) -> float:
        return self.progress.evaluations[-1]["accuracy"]


def build(config: Config, data: Sequences, states: list[int]) -> LRUClassifier:
    """The same weights for the same sizes, whatever ran before."""
    torch.manual_seed(config.seed_of("weights"))
    return LRUClassifier(
        data.train.shape[-1],
        config.features,
        states,
        data.classes,
        dropout=config.dropout,
        min_radius=config.min_radius,
        max_radius=config.max_radius,
        device=config.device,
    )


def optimizer_of(model: LRUClassifier, config: Config) -> torch.optim.Optimizer:
    """AdamW; what belongs to a recurrence learns more slowly, and does not decay."""
    inner = {id(p) for layer in layers_of(model) for p in layer.parameters()}
    own = [p for p in model.parameters() if id(p) in inner]
    others = [p for p in model.parameters() if id(p) not in inner]
    groups = [
        {"params": own, "factor": config.ssm_rate_factor, "weight_decay": 0.0},
        {"params": others, "factor": 1.0, "weight_decay": config.weight_decay},
    ]
    # one kernel for all parameters: they are many and small
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)


def layers_of(model: torch.nn.Module) -> list[LRU]:
    return [module for module in model.modules() if isinstance(module, LRU)]


class Training:
    """One task from its checkpoint, or from the start, to its last step. Without a log it writes nothing."""

    def __init__(
        self, task: Task, config: Config, data: Sequences, path: Path, log: MetricsLog | None, ranks: Ranks
    ) -> None:
        self.task, self.config, self.data, self.path, self.log, self.ranks = task, config, data, path, log, ranks
        self.progress = Progress(0, 0, 0.0, 0.0, 0.0, list(task.states), [], [])
        found = path.exists()
        if found:
            self.progress = checkpoint.progress_of(path, Progress)
        self.model = build(config, data, self.progress.states)
        self.optimizer = optimizer_of(self.model, config)
        self.spectra: dict[str, Tensor] = {}
        if found:
            checkpoint.restore(path, self.model, self.optimizer)
            self.spectra = checkpoint.extra(path)
        self.wrapped = ranks.wrap(self.model)

    def run(self, checkpoint_every: int, evaluate_every: int, on_step: Callable[[int, float | None], None]) -> Trained:
        """Raises RunError where the loss is no number, Interrupted after Ctrl-C."""
        config, steps = self.config, self.config.steps
        reductions = set(config.reduction_steps()) if self.task.reduce else set()
        on_step(self.progress.step, None)
        with interruptions() as interrupted:
            for step in range(self.progress.step + 1, steps + 1):
                start = time.perf_counter()
                loss, regularizing = self.learn(step)
                reducing = self.reduce(step) if step in reductions else 0.0
                seconds = self.progress.seconds + time.perf_counter() - start
                self.update(
                    step=step,
                    seconds=seconds,
                    reducing=self.progress.reducing + reducing,
                    regularizing=self.progress.regularizing + regularizing,
                )
                record: dict[str, Any] = {"task": self.task.name, "step": step, "loss": loss}
                record["states"] = self.progress.states
                if step % evaluate_every == 0 or step == steps:
                    record["accuracy"] = accuracy = accuracy_of(self.model, self.data, config)
                    evaluation = {"step": step, "seconds": seconds, "accuracy": accuracy}
                    evaluation["states"] = sum(self.progress.states) / len(self.progress.states)
                    self.update(evaluations=[*self.progress.evaluations, evaluation])
                stop = any(self.ranks.gather(interrupted()))
                if self.log:
                    self.log.append(record)
                if step % checkpoint_every == 0 or step == steps or stop:
                    self.ranks.led(self.save)
                on_step(step, loss)
                if stop:
                    raise Interrupted
        return Trained(self.task.name, self.model, self.progress, self.spectra)

    def learn(self, step: int) -> tuple[float, float]:
        """One step of the optimiser. The loss, and the seconds that the regulariser took."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * group["factor"] * config.rate(step)
        batch = self.ranks.share(batch_of(len(self.data.train), config, step))
        torch.manual_seed(config.seed_of(f"dropout/{step}/{self.ranks.rank}"))  # nothing to remember between steps
        self.wrapped.train()
        inputs, labels = self.data.train[batch].to(config.device), self.data.train_labels[batch].to(config.device)
        loss = F.cross_entropy(self.wrapped(inputs), labels)
        value = self.ranks.mean({"loss": loss.item()})["loss"]
        if not math.isfinite(value):
            raise self.diverged(step, f"the loss is {value}")
        self.optimizer.zero_grad()
        loss.backward()
        regularizing = self.regularize(step) if config.hsv_regularizer else 0.0
        self.optimizer.step()
        return value, regularizing

    def regularize(self, step: int) -> float:
        """Add the regulariser's gradients, which are the same on every rank. The seconds that it took."""
        assert self.config.hsv_regularizer is not None
        start = time.perf_counter()
        parameters = [p for layer in layers_of(self.model) for name, p in layer.named_parameters() if name != "D"]
        try:
            value = self.config.hsv_weight * regularizer(self.model, self.config.hsv_regularizer)
        except ValueError as error:  # an eigenvalue has reached the unit circle
            raise self.diverged(step, f"there is no regulariser's value: {error}") from error
        for p, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            assert p.grad is not None
            p.grad += gradient
        return time.perf_counter() - start

    def reduce(self, step: int) -> float:
        """Take states away; the leading process decides. The seconds that it took."""
        assert self.task.reduce is not None
        start, before = time.perf_counter(), self.model.states
        found = self.ranks.led(partial(self.decide, step))
        self.ranks.follow(self.model, self.optimizer, self.model.states, before)
        if self.model.states != before:
            self.wrapped = self.ranks.wrap(self.model)
        event: dict[str, Any] = {"step": step, "before": before, "states": self.model.states}
        if found is not None:
            event["error_bounds"] = [layer.error_bound for layer in found.layers]
            event["conditions"] = [layer.condition for layer in found.layers]
            for i, layer in enumerate(found.layers):
                self.spectra[f"{step}.{i}"] = layer.singular_values.cpu()
        event["seconds"] = time.perf_counter() - start
        event["clock"] = self.progress.seconds + event["seconds"]  # of training, but for the step that it follows
        self.update(states=self.model.states, reductions=[*self.progress.reductions, event])
        return event["seconds"]

    def decide(self, step: int) -> kd.nn.Truncation | None:
        """What the leading process takes away."""
        assert self.task.reduce is not None
        try:
            return self.task.reduce(self.model, self.optimizer, step)
        except ValueError as error:
            raise self.diverged(step, f"no state can be taken away: {error}") from error

    def diverged(self, step: int, why: str) -> RunError:
        kept = f"the checkpoint in {self.path} is from before" if self.path.exists() else "there is no checkpoint"
        return RunError(f"{self.task.name}, step {step}: {why}. A smaller --learning-rate may help; {kept}")

    def update(self, **changes: Any) -> None:
        self.progress = dataclasses.replace(self.progress, **changes)

    def save(self) -> None:
        """Metrics first: a checkpoint never counts on a line that is not on the disk. None is of a diverged model."""
        if not self.log:
            return
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self.diverged(self.progress.step, "a parameter is not finite")
        self.update(metrics_bytes=self.log.sync())
        checkpoint.save(self.path, self.model, self.optimizer, self.config, self.progress, self.spectra)


def batch_of(count: int, config: Config, step: int) -> Tensor:
    """The indices of a step's batch: every epoch goes through all of them in an order of its own."""
    size = min(config.batch, count)
    per_epoch = count // size
    epoch, place = divmod(step - 1, per_epoch)
    return order_of(count, config.seed_of(f"epoch/{epoch}"))[place * size : (place + 1) * size]


@lru_cache(1)  # every step of an epoch asks
def order_of(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def systems_of(model: LRUClassifier) -> tuple[list[Tensor], ...]:
    """Λ, B and C of every layer."""
    return tuple(map(list, zip(*(layer.system() for layer in layers_of(model)), strict=True)))


def regularizer(model: LRUClassifier, kind: str) -> Tensor:
    """The sum over all layers of Σσ (nuclear) or Σσ² (energy)."""
    Lambda, B, C = systems_of(model)
    if kind == "energy":
        return torch.stack(kd.hankel_energy(Lambda, B, C)).sum()
    return torch.cat(kd.hankel_singular_values(Lambda, B, C)).sum()


@torch.no_grad()
def accuracy_of(model: LRUClassifier, data: Sequences, config: Config) -> float:
    """On the test set."""
    model.eval()
    right = 0
    for inputs, labels in zip(data.test.split(EVALUATED), data.test_labels.split(EVALUATED), strict=True):
        right += int((model(inputs.to(config.device)).argmax(-1).cpu() == labels).sum())
    return right / len(data.test)
