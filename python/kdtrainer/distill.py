"""What each model is trained on: labels for teachers and plain students, teachers for the distilled one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.nn import ProjectionAlignment, head_of
from kdtrainer import models
from kdtrainer.config import Config
from kdtrainer.data import CLASSES, Digits
from kdtrainer.states import standardised
from kdtrainer.train import Task, drawn

PAIRS = ((0, 0), (1, 1))  # early and late states of the student and of each teacher
TEACHER_BATCH, LABELLED_BATCH, DISTILLED_BATCH = 64, 32, 128


@dataclass(frozen=True)
class ModelTask(Task):
    """Of a classifier, which is trained or is part of that."""

    model: models.Classifier


def evaluation(model: models.Classifier, digits: Digits) -> dict[str, float]:
    """On the test set."""
    predicted = models.probabilities(model, digits.test_images)
    return {"accuracy": models.accuracy(predicted, digits.test_labels)}


def labels_task(
    name: str, model: models.Classifier, digits: Digits, labelled: Tensor, size: int, steps: int, rate: float
) -> ModelTask:
    """Cross-entropy on the training images in `labelled`."""

    def losses(batch: Tensor) -> dict[str, Tensor]:
        logits, _ = model(digits.train_images[batch])
        return {"loss": F.cross_entropy(logits, digits.train_labels[batch])}

    draw, evaluate = partial(drawn, (labelled, size)), partial(evaluation, model, digits)
    return ModelTask(name, steps, rate, model, draw, losses, evaluate, model)


def distillation_task(
    name: str,
    model: models.Classifier,
    teachers: Sequence[tuple[str, models.Classifier]],
    digits: Digits,
    config: Config,
    rate: float,
    backend: str,
) -> ModelTask:
    """Cross-entropy on the few labelled images; alignment to all teachers and their soft targets on all images.

    Alignment and soft targets have weights in `config`; one of weight 0 is not computed.
    """
    frozen = {teacher_name: states_of(teacher, digits.train_images) for teacher_name, teacher in teachers}
    aligners, targets = nn.ModuleDict(), {}
    if config.alignment_weight:
        for teacher_name, teacher in teachers:
            aligners[teacher_name] = aligner(teacher_name, model, teacher, config, backend)
            states = frozen[teacher_name]
            targets[teacher_name] = [logits_of(teacher, states)] if config.lora_rank else standardised(states)
    last, heads = [states[-1] for states in frozen.values()], [head_of(teacher.head) for _, teacher in teachers]
    everything = torch.arange(len(digits.train_images))

    def alignment(states: Sequence[Tensor], batch: Tensor) -> Tensor:
        aligned = [model.head(states[-1])] if config.lora_rank else states  # (DISTILLED_BATCH, d_s) each
        per_teacher = [each(aligned, [target[batch] for target in targets[name]]) for name, each in aligners.items()]
        return torch.stack(per_teacher).mean()

    def soft_targets(states: Sequence[Tensor], batch: Tensor) -> Tensor:
        return kd.linear_distillation_loss(
            states[-1],
            head_of(model.head),
            [state[batch] for state in last],
            heads,
            divergence=config.divergence,
            temperature=config.temperature,
            mixture=config.mixture,
            backend=backend,
        )

    def losses(few: Tensor, many: Tensor) -> dict[str, Tensor]:
        states = model.states(digits.train_images[torch.cat([few, many])])
        logits = model.head(states[-1][: len(few)])
        distilled = [state[len(few) :] for state in states]
        parts = {"cross_entropy": F.cross_entropy(logits, digits.train_labels[few])}
        loss = parts["cross_entropy"]
        if config.alignment_weight:
            parts["alignment"] = alignment(distilled, many)
            loss = loss + config.alignment_weight * parts["alignment"]
        if config.soft_targets:
            parts["soft_targets"] = soft_targets(distilled, many)
            loss = loss + config.soft_targets * parts["soft_targets"]
        return {"loss": loss} | parts

    trained = nn.ModuleDict({"student": model, "aligners": aligners})
    draw = partial(drawn, (digits.labelled, LABELLED_BATCH), (everything, DISTILLED_BATCH))
    return ModelTask(name, config.steps, rate, trained, draw, losses, partial(evaluation, model, digits), model)


def aligner(
    name: str, model: models.Classifier, teacher: models.Classifier, config: Config, backend: str
) -> ProjectionAlignment:
    """Of the student to the teacher of this name.

    The teacher's hidden states are projected by a frozen orthogonal matrix, the student's by learned ones: a learned
    teacher projection could make the alignment easy by making the space poor. With `config.lora_rank` logits are
    aligned in place of hidden states: they need no projection, and projections would have many times the parameters
    of the adapters.
    """
    options: dict[str, Any] = {"metric": config.metric, "method": config.method, "backend": backend}
    if config.lora_rank:
        options |= {"student_projection": "none", "teacher_projection": "none"}
        return ProjectionAlignment(((0, 0),), CLASSES, CLASSES, CLASSES, **options)
    options |= {"teacher_projection": "orthogonal", "seed": config.seed_of(f"projection/{name}"), "bias": True}
    return ProjectionAlignment(PAIRS, model.widths, teacher.widths, config.embedding_width, **options)


@torch.no_grad()
def states_of(teacher: models.Classifier, images: Tensor) -> list[Tensor]:
    """(N, d_t) each, computed once for a frozen teacher."""
    teacher.eval()
    return teacher.states(images)


@torch.no_grad()
def logits_of(teacher: models.Classifier, states: Sequence[Tensor]) -> Tensor:
    """(N, 10)."""
    return teacher.head(states[-1])
