"""What each model is trained on: labels for teachers and plain students, teachers' states for the distilled one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.nn import ProjectionAlignment
from kdtrainer import models
from kdtrainer.config import Config
from kdtrainer.data import CLASSES, Digits

PAIRS = ((0, 0), (1, 1))  # early and late states of the student and of each teacher
TEACHER_BATCH, LABELLED_BATCH, ALIGNED_BATCH = 64, 32, 128


@dataclass(frozen=True)
class Task:
    """Something to train: `losses` draws its batch from torch's generator, and its "loss" is minimised."""

    name: str
    steps: int
    learning_rate: float
    model: models.Classifier
    trained: nn.Module  # the model, and what is trained beside it
    losses: Callable[[], dict[str, Tensor]]


def batch_of(indices: Tensor, size: int) -> Tensor:
    """`size` of the indices, or all, without repetition."""
    return indices[torch.randperm(len(indices))[:size]]


def labels_task(
    name: str, model: models.Classifier, digits: Digits, labelled: Tensor, size: int, steps: int, rate: float
) -> Task:
    """Cross-entropy on the training images in `labelled`."""

    def losses() -> dict[str, Tensor]:
        batch = batch_of(labelled, size)
        logits, _ = model(digits.train_images[batch])
        return {"loss": F.cross_entropy(logits, digits.train_labels[batch])}

    return Task(name, steps, rate, model, model, losses)


def distillation_task(
    name: str,
    model: models.Classifier,
    teachers: Sequence[tuple[str, models.Classifier]],
    digits: Digits,
    config: Config,
    rate: float,
    backend: str,
) -> Task:
    """Cross-entropy on the few labelled images beside alignment to all teachers on all training images.

    Each teacher's hidden states are projected by a frozen orthogonal matrix, the student's by learned ones: a learned
    teacher projection could make the alignment easy by making the space poor. With `config.lora_rank` logits are
    aligned in place of hidden states: they need no projection, and projections would have many times the parameters
    of the adapters.
    """
    aligners, targets = nn.ModuleDict(), {}
    for teacher_name, teacher in teachers:
        options: dict[str, Any] = {"metric": config.metric, "method": config.method, "backend": backend}
        if config.lora_rank:
            targets[teacher_name] = [logits_of(teacher, digits.train_images)]
            options |= {"student_projection": "none", "teacher_projection": "none"}
            aligner = ProjectionAlignment(((0, 0),), CLASSES, CLASSES, CLASSES, **options)
        else:
            targets[teacher_name] = standardised_states(teacher, digits.train_images)
            options |= {"teacher_projection": "orthogonal", "seed": config.seed_of(f"projection/{teacher_name}")}
            aligner = ProjectionAlignment(
                PAIRS, model.widths, teacher.widths, config.embedding_width, bias=True, **options
            )
        aligners[teacher_name] = aligner
    everything = torch.arange(len(digits.train_images))

    def losses() -> dict[str, Tensor]:
        few, many = batch_of(digits.labelled, LABELLED_BATCH), batch_of(everything, ALIGNED_BATCH)
        logits, states = model(digits.train_images[torch.cat([few, many])])
        cross_entropy = F.cross_entropy(logits[: len(few)], digits.train_labels[few])
        aligned = [state[len(few) :] for state in ([logits] if config.lora_rank else states)]  # (ALIGNED_BATCH, d_s)
        per_teacher = [
            aligner(aligned, [target[many] for target in targets[teacher]]) for teacher, aligner in aligners.items()
        ]
        alignment = torch.stack(per_teacher).mean()
        loss = cross_entropy + config.alignment_weight * alignment
        return {"loss": loss, "cross_entropy": cross_entropy, "alignment": alignment}

    trained = nn.ModuleDict({"student": model, "aligners": aligners})
    return Task(name, config.steps, rate, model, trained, losses)


@torch.no_grad()
def logits_of(teacher: models.Classifier, images: Tensor) -> Tensor:
    """(N, 10), computed once for a frozen teacher."""
    teacher.eval()
    logits, _ = teacher(images)
    return logits


@torch.no_grad()
def standardised_states(teacher: models.Classifier, images: Tensor) -> list[Tensor]:
    """(N, d_t) each, computed once for a frozen teacher: mean 0 per feature, and mean square 1 over all of them.

    What all images have in common says nothing about any of them, but would dominate cosine and mse alike.
    """
    teacher.eval()
    _, states = teacher(images)
    centred = [state - state.mean(0) for state in states]
    return [state / state.square().mean().sqrt() for state in centred]
