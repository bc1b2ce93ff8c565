"""Several students on one frozen base, trained beside each other: what is the same for all of them is computed once.

That is the teacher's pass, and the products of the frozen weights in the first layers of encoder and decoder, whose
inputs no adapter has touched yet: q, k and v of all students are one call of `lora_linear_group`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.nn import ProjectionAlignment
from kdtrainer.compare import Deviation, deviation
from kdtrainer.config import StepConfig
from kdtrainer.whisper import pair as whisper

ADAPTER = "default"  # PEFT's name of the only one


def siblings(pair: whisper.Pair, seeds: Sequence[int]) -> list[whisper.Pair]:
    """The pair, and for each seed a sibling."""
    return [pair, *(sibling(pair, seed) for seed in seeds)]


def sibling(pair: whisper.Pair, seed: int, rank: int | None = None) -> whisper.Pair:
    """With other adapters, of this rank or the pair's, and other projections, and with the same frozen tensors."""
    student, aligner = copied(pair.student, pair.aligner)
    adapters = cast(LoraConfig, student.peft_config[ADAPTER])
    if rank is not None:
        adapters.r = adapters.lora_alpha = rank  # which leaves the scaling, their ratio, as it is
    torch.manual_seed(seed)
    for layer in student.modules():
        if isinstance(layer, Linear):
            A, B = adapter(layer)
            layer.lora_A[ADAPTER] = nn.Linear(A.in_features, adapters.r, bias=False)
            layer.lora_B[ADAPTER] = nn.Linear(adapters.r, B.out_features, bias=False)
            layer.r[ADAPTER], layer.lora_alpha[ADAPTER] = adapters.r, adapters.lora_alpha
            if not B.weight.any():
                nn.init.zeros_(adapter(layer)[1].weight)
    aligner.reset_parameters()
    return whisper.Pair(pair.teacher, student, aligner)


def copied(student: PeftModel, aligner: ProjectionAlignment) -> tuple[PeftModel, ProjectionAlignment]:
    """With the same frozen tensors."""
    frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
    return deepcopy((student, aligner), frozen)


def adapter(layer: Linear) -> tuple[nn.Linear, nn.Linear]:
    return cast(nn.Linear, layer.lora_A[ADAPTER]), cast(nn.Linear, layer.lora_B[ADAPTER])


class FirstLayer:
    """q, k and v of all students' first layer: the first student's forward computes them, the others' take theirs.

    Students are run in their order, each once in a step, and their losses have one backward.
    """

    def __init__(self, attentions: Sequence[nn.Module]) -> None:
        self.layers = [[cast(Linear, getattr(x, f"{part}_proj")) for part in "qkv"] for x in attentions]
        self.outputs: dict[tuple[int, int], Tensor] = {}
        for k, own in enumerate(self.layers):
            for i, layer in enumerate(own):
                layer.forward = partial(self.take, k, i, layer.forward)  # type: ignore[method-assign]

    def take(self, student: int, part: int, alone: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Where a student is evaluated it is by itself."""
        if not self.layers[student][part].training:
            return alone(x)
        if (student, part) == (0, 0):
            every = [(k, i) for k in range(len(self.layers)) for i in range(len(self.layers[k]))]
            found = kd.lora_linear_group(x, [self.member(self.layers[k][i]) for k, i in every])
            self.outputs = dict(zip(every, found, strict=True))
        output = self.outputs.pop((student, part), None)
        if output is None or output.shape[:-1] != x.shape[:-1]:
            raise RuntimeError(f"student {student} was run before the first of its cohort, or on another batch")
        return output

    def member(self, layer: Linear) -> kd.LoRA:
        base, (A, B) = cast(nn.Linear, layer.base_layer), adapter(layer)
        dropout = layer.lora_dropout[ADAPTER]
        p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        return kd.LoRA(base.weight, A.weight, B.weight, base.bias, layer.scaling[ADAPTER], p)


def share_first_layers(students: Sequence[PeftModel]) -> None:
    """Of encoder and decoder, in place."""
    models = [cast(Any, student.get_base_model()).model for student in students]
    FirstLayer([model.encoder.layers[0].self_attn for model in models])
    FirstLayer([model.decoder.layers[0].self_attn for model in models])


@torch.no_grad()
def taught(pair: whisper.Pair, batch: whisper.Batch) -> whisper.States:
    return whisper.states(pair.teacher, batch)


Loss = Callable[[whisper.Pair, whisper.States, whisper.Batch], Tensor]


@dataclass(frozen=True)
class Cohort:
    """Students with an optimiser, and what their steps took."""

    students: list[whisper.Pair]
    loss_of: Loss
    optimizer: torch.optim.Optimizer
    losses: list[list[float]] = field(default_factory=list)  # of each step, student by student
    seconds: list[float] = field(default_factory=list)  # of each step of all

    def in_turn(self, batch: whisper.Batch) -> list[float]:
        """A step of each, as runs one after the other make it."""
        found = []
        for pair in self.students:
            loss = self.loss_of(pair, taught(pair, batch), batch)
            loss.backward()
            found.append(loss.item())
        return found

    def together(self, batch: whisper.Batch) -> list[float]:
        """A step of all, of which the teacher's pass and the first layers are shared."""
        teacher = taught(self.students[0], batch)
        losses = torch.stack([self.loss_of(pair, teacher, batch) for pair in self.students])
        losses.sum().backward()
        return losses.tolist()

    def step(self, how: Callable[[whisper.Batch], list[float]], batch: whisper.Batch) -> None:
        start = time.perf_counter()
        losses = how(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(losses)
        self.seconds.append(time.perf_counter() - start)


def compared(
    pair: whisper.Pair, config: StepConfig, loss_of: Loss, rate: float, batches: Iterable[whisper.Batch]
) -> tuple[dict[str, Any], Deviation]:
    """Students in turn and together, the two taking turns, without dropout, so that they learn the same.

    The first step warms up. The weights are the pair's and its siblings', in each of the two.
    """
    pair.set_dropout(0.0)
    first = siblings(pair, [config.seed + k for k in range(1, config.students)])
    second = [whisper.Pair(pair.teacher, *copied(each.student, each.aligner)) for each in first]
    share_first_layers([each.student for each in second])
    turn, beside = (Cohort(each, loss_of, torch.optim.AdamW(trained(each), lr=rate)) for each in (first, second))
    for batch in batches:
        turn.step(turn.in_turn, batch)
        beside.step(beside.together, batch)
    in_turn, together = (median(each.seconds[1:]) for each in (turn, beside))
    losses, reference = ([loss for step in each.losses for loss in step] for each in (beside, turn))
    weights, others = ({str(k): p.detach() for k, p in enumerate(trained(each))} for each in (second, first))
    told = {"count": config.students, "in_turn": in_turn, "together": together, "ratio": in_turn / together}
    return told, deviation(losses, reference, weights, others, config.budget)


def trained(students: Iterable[whisper.Pair]) -> list[nn.Parameter]:
    return [p for pair in students for p in pair.trained().values()]
