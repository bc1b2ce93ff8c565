"""Teachers of three architectures and the student: hidden states to align, and a head that makes logits of the last."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.nn import LoRALinear
from kdtrainer.data import CLASSES

SIDE = 8  # images are SIDE x SIDE
LORA_ALPHA = 16.0  # over the rank, it scales what the adapters add


class Classifier(nn.Module):
    """(N, 64) images -> (N, 10) logits and one (N, width) state per entry of `widths`, early layers first."""

    widths: tuple[int, ...]
    head: nn.Linear | LoRALinear  # of the last state

    def states(self, images: Tensor) -> list[Tensor]:
        """Without the logits."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        states = self.states(images)
        return self.head(states[-1]), states


class MLP(Classifier):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths = widths
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((SIDE * SIDE, *widths)))
        self.head = nn.Linear(widths[-1], CLASSES)

    def states(self, images: Tensor) -> list[Tensor]:
        x, states = images, []
        for layer in self.hidden:
            x = F.gelu(layer(x))  # (N, width)
            states.append(x)
        return states


class CNN(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 2 * 2, 128)
        self.head = nn.Linear(128, CLASSES)
        self.widths = (32 * 2 * 2, 128)

    def states(self, images: Tensor) -> list[Tensor]:
        x = images.view(-1, 1, SIDE, SIDE)
        x = F.max_pool2d(F.gelu(self.conv1(x)), 2)  # (N, 16, 4, 4)
        x = F.max_pool2d(F.gelu(self.conv2(x)), 2)  # (N, 32, 2, 2)
        early = x.flatten(1)
        return [early, F.gelu(self.hidden(early))]


class RowTransformer(Classifier):
    """The eight rows of an image are its tokens."""

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, width)
        self.position = nn.Parameter(0.1 * torch.randn(SIDE, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        self.widths = (SIDE * width, width)

    def states(self, images: Tensor) -> list[Tensor]:
        x = self.embed(images.view(-1, SIDE, SIDE)) + self.position  # (N, rows, width)
        x = self.layers[0](x)
        early = x.flatten(1)
        for layer in self.layers[1:]:
            x = layer(x)
        return [early, self.norm(x).mean(1)]


TEACHERS: dict[str, Callable[[], Classifier]] = {
    "mlp": lambda: MLP(256, 256),
    "cnn": CNN,
    "transformer": RowTransformer,
}


def student() -> Classifier:
    """A small share of any teacher's parameters."""
    return MLP(32, 32)


def adapt(model: nn.Module, rank: int, backend: str) -> None:
    """Freeze the model and put a low-rank adapter on each of its linear layers, in place; its outputs stay."""
    model.requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear.from_linear(layer, rank, alpha=LORA_ALPHA, backend=backend))


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def trained_parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def probabilities(model: Classifier, images: Tensor) -> Tensor:
    """(N, 10), in evaluation mode."""
    training = model.training
    model.eval()
    logits, _ = model(images)
    model.train(training)
    return logits.softmax(-1)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    return (probabilities.argmax(-1) == labels).double().mean().item()
