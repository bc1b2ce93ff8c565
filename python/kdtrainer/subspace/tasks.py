"""What is trained: teachers, heads on their frozen features, and students in the space of a head."""

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.nn import SubspaceHead, head_of
from kdtrainer.subspace import networks
from kdtrainer.subspace.config import FULL, PROJECTIONS, RATIOS, Config
from kdtrainer.subspace.examples import Examples
from kdtrainer.train import Task, drawn

TEACHER_BATCH, HEAD_BATCH, LABELLED_BATCH, DISTILLED_BATCH = 128, 256, 32, 128
TEACHER_RATE, HEAD_RATE, STUDENT_RATE = 2e-3, 3e-2, 5e-3
EVALUATED = 500  # examples at a time
LABELS, ALL_LABELS = "labels", "labels-all"
FEATURES, REUSED, SOFT_TARGETS = "features", "features-head", "soft-targets"
NATIVE, NATIVE_LABELS = "native", "native-labels"
UNTAUGHT, TAUGHT = (LABELS, ALL_LABELS), (FEATURES, REUSED, SOFT_TARGETS, NATIVE, NATIVE_LABELS)


@dataclasses.dataclass(frozen=True)
class Features:
    """A frozen teacher's, of mean 0 each and mean square 1 over all of them, on the training set."""

    train: Tensor  # (N, d)
    test: Tensor


def standardised(train: Tensor, test: Tensor) -> Features:
    """What all examples have in common says nothing about any of them; a scale suits every head's learning rate."""
    mean = train.mean(0)
    scale = (train - mean).square().mean().sqrt()
    return Features((train - mean) / scale, (test - mean) / scale)


def effective_dimension(features: Features) -> float:
    """(Σλ)²/Σλ² of their covariance: how many directions matter, were they equally long (the participation ratio)."""
    covariance = features.train.mT @ features.train / len(features.train)  # (d, d)
    return (covariance.trace() ** 2 / covariance.square().sum()).item()


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Of all inputs, in evaluation mode."""
    training = model.training
    model.eval()
    found = torch.cat([model(some) for some in inputs.split(EVALUATED)])
    model.train(training)
    return found


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return (outputs(model, inputs).argmax(-1) == labels).double().mean().item()


def labels_task(
    name: str, model: nn.Module, examples: Examples, labelled: Tensor, size: int, steps: int, rate: float
) -> Task:
    """Cross-entropy on the training examples in `labelled`."""

    def losses(batch: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(model(examples.train[batch]), examples.train_labels[batch])}

    return Task(name, steps, rate, model, partial(drawn, (labelled, size)), losses, on_test_set(model, examples))


def on_test_set(model: nn.Module, examples: Examples) -> Callable[[], dict[str, float]]:
    return lambda: {"accuracy": accuracy(model, examples.test, examples.test_labels)}


# Heads


def key(projection: str, ratio: int) -> str:
    return f"{projection}-{ratio}"


def heads_of(features: Features, examples: Examples, config: Config) -> nn.ModuleDict:
    """The full head, and one for each projection and ratio."""
    d, classes = features.train.shape[1], examples.classes
    heads = nn.ModuleDict({FULL: nn.Linear(d, classes)})
    for projection in PROJECTIONS:
        for ratio in RATIOS:
            seed = config.seed_of(f"projection/{ratio}")
            head = SubspaceHead(d, d // ratio, classes, projection=projection, seed=seed)
            heads[key(projection, ratio)] = head.fit(features.train) if projection == "pca" else head
    return heads


def heads_task(name: str, features: Features, examples: Examples, config: Config) -> tuple[Task, nn.ModuleDict]:
    """Each head as if it were alone, for none shares a parameter with another, but all see the same batches."""
    heads = heads_of(features, examples, config)
    everything = torch.arange(len(features.train))

    def losses(batch: Tensor) -> dict[str, Tensor]:
        h, labels = features.train[batch], examples.train_labels[batch]
        return {"loss": torch.stack([F.cross_entropy(head(h), labels) for head in heads.values()]).sum()}

    def evaluate() -> dict[str, float]:
        return {name: accuracy(head, features.test, examples.test_labels) for name, head in heads.items()}

    draw = partial(drawn, (everything, HEAD_BATCH))
    return Task(name, config.head_steps, HEAD_RATE, heads, draw, losses, evaluate), heads


# Students


class Student(nn.Module):
    """z of the body, and logits of the head."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def student_body(examples: Examples, k: int, config: Config) -> nn.Module:
    """The same first weights for all students."""
    torch.manual_seed(config.seed_of("student"))
    if examples.train.dim() == 2:
        return networks.TextStudent(int(max(examples.train.max(), examples.test.max())) + 1, k)
    _, channels, side, _ = examples.train.shape
    return networks.ImageStudent(channels, side, k)


def untaught_task(
    name: str, which: str, examples: Examples, few: Tensor, k: int, config: Config
) -> tuple[Task, Student]:
    """A student that sees labels alone: few or all."""
    student = Student(student_body(examples, k, config), nn.Linear(k, examples.classes))
    labelled = few if which == LABELS else torch.arange(len(examples.train))
    size = LABELLED_BATCH if which == LABELS else DISTILLED_BATCH
    return labels_task(name, student, examples, labelled, size, config.steps, STUDENT_RATE), student


def taught_task(
    name: str, which: str, examples: Examples, few: Tensor, features: Features, heads: nn.ModuleDict, config: Config
) -> tuple[Task, Student]:
    """A student that learns from the teacher's features of all training examples, and from few labels or none."""
    small, full = deepcopy(heads[key(config.projection, config.ratio)]), deepcopy(heads[FULL])
    assert isinstance(small, SubspaceHead) and isinstance(full, nn.Linear)
    small.requires_grad_(False), full.requires_grad_(False)  # the teacher's
    k, d = small.subspace, small.features
    body = student_body(examples, k, config)
    up = nn.Linear(k, d)  # into the teacher's features
    if which in (NATIVE, NATIVE_LABELS):
        student = Student(body, small.classifier)
    elif which == REUSED:
        student = Student(body, nn.Sequential(up, full))
    else:
        student = Student(body, nn.Linear(k, examples.classes))
    trained = nn.ModuleDict({"student": student} | ({"up": up} if which == FEATURES else {}))
    lesson = lessons(which, student, up, small, full, features, config)
    weight = config.soft_targets if which == SOFT_TARGETS else config.alignment_weight
    labelled = which not in (REUSED, NATIVE)
    everything = torch.arange(len(examples.train))

    def losses(many: Tensor, *first: Tensor) -> dict[str, Tensor]:
        """Of all examples, and of some with labels, if there are any."""
        z = student.body(examples.train[torch.cat([*first, many])])  # (labelled and others, k)
        parts = {"teacher": lesson(z[-len(many) :], features.train[many])}
        if not first:
            return {"loss": parts["teacher"]} | parts
        labels = examples.train_labels[first[0]]
        parts["cross_entropy"] = F.cross_entropy(student.head(z[: len(labels)]), labels)
        return {"loss": parts["cross_entropy"] + weight * parts["teacher"]} | parts

    kinds = [(everything, DISTILLED_BATCH)] + ([(few, LABELLED_BATCH)] if labelled else [])
    draw, evaluate = partial(drawn, *kinds), on_test_set(student, examples)
    return Task(name, config.steps, STUDENT_RATE, trained, draw, losses, evaluate), student


def lessons(
    which: str,
    student: Student,
    up: nn.Linear,
    small: SubspaceHead,
    full: nn.Linear,
    features: Features,
    config: Config,
) -> Callable[[Tensor, Tensor], Tensor]:
    """From z (N, k) and the teacher's features (N, d): the loss that teaches.

    Alignments are the share of the target's mean square that is not met, so that one weight suits them all.
    """
    backend = config.backend
    R, offset = small.R, small.offset

    def soft_targets(z: Tensor, h: Tensor) -> Tensor:
        own, theirs = head_of(student.head), head_of(full)
        return kd.linear_distillation_loss(z, own, h, theirs, temperature=config.temperature, backend=backend)

    def whole(z: Tensor, h: Tensor) -> Tensor:
        P, bias = up.weight, up.bias
        return kd.projection_alignment_loss(z, h, P, None, student_bias=bias, metric="mse", backend=backend)

    target = small.project(features.train).square().mean()

    def native(z: Tensor, h: Tensor) -> Tensor:
        loss = kd.projection_alignment_loss(z, h, None, R, teacher_bias=offset, metric="mse", backend=backend)
        return loss / target

    return {SOFT_TARGETS: soft_targets, FEATURES: whole, REUSED: whole}.get(which, native)
