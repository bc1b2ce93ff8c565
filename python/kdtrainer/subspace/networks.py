"""Teachers that are trained here, and the students: each maps what it sees to features."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = 4  # a ViT's patches are GRID x GRID


class CNN(nn.Module):
    """(N, c, side, side) -> (N, d)."""

    def __init__(self, channels: int, side: int, d: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (side // 4) ** 2, d)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (N, 32, side/4, side/4)
        return F.relu(self.hidden(x.flatten(1)))


class ViT(nn.Module):
    """(N, c, side, side) -> (N, d): patches are tokens, and their mean goes through a hidden layer (pre-logits)."""

    def __init__(self, channels: int, side: int, d: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        patch = side // GRID
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.1 * torch.randn(GRID * GRID, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, d)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT + self.position  # (N, patches, width)
        for layer in self.layers:
            x = layer(x)
        return F.gelu(self.hidden(self.norm(x).mean(1)))


TEACHERS: dict[str, Callable[[int, int, int], nn.Module]] = {"cnn": CNN, "vit": ViT}


class ImageStudent(nn.Module):
    """(N, c, side, side) -> z (N, k), with a small share of any teacher's parameters."""

    def __init__(self, channels: int, side: int, k: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.out = nn.Linear(16 * (side // 4) ** 2, k)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(images))))  # (N, 16, side/4, side/4)
        return self.out(x.flatten(1))


class TextStudent(nn.Module):
    """Tokens (N, T), 0 where there is none -> z (N, k): the mean of their embeddings, and a hidden layer."""

    def __init__(self, vocabulary: int, k: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, k)

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens != 0).unsqueeze(-1)  # (N, T, 1)
        mean = (self.embed(tokens) * there).sum(1) / there.sum(1).clamp_min(1)
        return self.out(F.relu(self.hidden(mean)))
