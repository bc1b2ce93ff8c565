"""An ensemble of two teachers into a student that sees few labels, in a training loop of one's own.

    python examples/own_training_loop.py

The points are made up: 10 classes, each of three clouds in 16 dimensions. docs/own-loop.md walks through such a loop,
with masks, adapters and checkpoints.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd

CLASSES, WIDTH = 10, 16
torch.manual_seed(0)
clouds = torch.randn(3 * CLASSES, WIDTH)


def points(count: int) -> tuple[Tensor, Tensor]:
    cloud = torch.randint(len(clouds), (count,))
    return clouds[cloud] + 0.45 * torch.randn(count, WIDTH), cloud % CLASSES


class Classifier(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def train(parameters: list[nn.Parameter], loss_of: Callable[[], Tensor], steps: int = 120) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def on_labels(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def batch() -> tuple[Tensor, Tensor]:
    chosen = torch.randperm(len(train_x))[:128]
    return train_x[chosen], train_y[chosen]


@torch.no_grad()
def accuracy(predict: Callable[[Tensor], Tensor]) -> float:
    return (predict(test_x).argmax(-1) == test_y).float().mean().item()


train_x, train_y = points(2000)
test_x, test_y = points(2000)
few_x, few_y = train_x[:60], train_y[:60]

teachers = [Classifier(96), Classifier(128)]
for teacher in teachers:
    train(list(teacher.parameters()), lambda teacher=teacher: on_labels(teacher, *batch()))
    teacher.requires_grad_(False)

alone = Classifier(32)
student = Classifier(32)
student.load_state_dict(alone.state_dict())
train(list(alone.parameters()), lambda: on_labels(alone, few_x, few_y))

aligners = nn.ModuleList(
    kd.nn.ProjectionAlignment([(0, 0)], 32, width, 64, teacher_projection="orthogonal") for width in (96, 128)
)
soft_targets = kd.nn.LinearDistillation(temperature=2.0)
heads = [teacher.head for teacher in teachers]


def distilling() -> Tensor:
    x, _ = batch()  # without labels
    states, of_teachers = student.body(x), [teacher.body(x) for teacher in teachers]
    soft = soft_targets(states, student.head, of_teachers, heads)
    alignments = [align([states], [those]) for align, those in zip(aligners, of_teachers, strict=True)]
    return on_labels(student, few_x, few_y) + soft + sum(alignments) / len(alignments)


train([*student.parameters(), *aligners.parameters()], distilling)
ensemble = accuracy(lambda x: torch.stack([teacher(x).softmax(-1) for teacher in teachers]).mean(0))
print(f"right: teachers {ensemble:.1%}, student by 60 labels {accuracy(alone):.1%}, distilled {accuracy(student):.1%}")
assert accuracy(student) > accuracy(alone)
