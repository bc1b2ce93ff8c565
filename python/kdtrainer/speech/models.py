"""Recognisers of four architectures: hidden states to align, and a head that makes CTC logits of the last."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kdkernels.nn import LoRALinear, LRUBlock
from kdtrainer.speech.features import FEATURES
from kdtrainer.speech.text import CLASSES

WIDTH = 128  # of the student, and of most teachers, whose states can be compared with its own as they are
DROPOUT = 0.1


class Recogniser(nn.Module):
    """(B, T, FEATURES) frames -> one (B, T, width) state per entry of `widths`, from the middle and from the end.

    What lies beyond an utterance's length reaches none of its frames.
    """

    widths: tuple[int, int]
    head: nn.Linear | LoRALinear  # (CLASSES, width) of the last state

    def states(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        """Without the logits."""
        raise NotImplementedError

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, CLASSES)"""
        return self.head(self.states(frames, lengths)[-1])


def counted(frames: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, 1): whether a frame is the utterance's."""
    return (torch.arange(frames.shape[1]) < lengths[:, None]).unsqueeze(-1)


class Neighbours(nn.Module):
    """x + GELU(W [x_{t−d}, x_t, x_{t+d}]) of the normalised x: a dilated convolution, written as a linear layer."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(3 * width, width)
        self.dropout = nn.Dropout(DROPOUT)
        self.dilation = dilation

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        d, T = self.dilation, x.shape[1]
        padded = F.pad(self.norm(x) * mask, (0, 0, d, d))  # (B, T + 2d, width)
        around = torch.cat([padded[:, k * d : k * d + T] for k in range(3)], -1)  # (B, T, 3 width)
        return x + self.dropout(F.gelu(self.linear(around)))


class Convolutional(Recogniser):
    """Dilated convolutions, a time-delay network."""

    def __init__(self, width: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = (width, width)
        self.encoder = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(Neighbours(width, d) for d in dilations)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def states(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        mask = counted(frames, lengths)
        x, states = self.encoder(frames), []
        for layer in self.layers:
            x = layer(x, mask)
            states.append(x)
        return [states[len(states) // 2 - 1], self.norm(x)]


class Recurrent(Recogniser):
    """Gated recurrent units in both directions."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.widths = (2 * hidden, 2 * hidden)
        inputs = [FEATURES] + [2 * hidden] * (layers - 1)
        self.layers = nn.ModuleList(nn.GRU(d, hidden, batch_first=True, bidirectional=True) for d in inputs)
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(2 * hidden, CLASSES)

    def states(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        x, states = frames, []
        for layer in self.layers:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            x, _ = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=frames.shape[1])
            x = self.dropout(x)
            states.append(x)
        return [states[len(states) // 2 - 1], x]


class Attentive(Recogniser):
    """A transformer; the convolutions before it say where a frame is."""

    def __init__(self, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.widths = (width, width)
        self.encoder = nn.Linear(FEATURES, width)
        self.places = nn.ModuleList(Neighbours(width, d) for d in (1, 2))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=DROPOUT, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def states(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        mask = counted(frames, lengths)
        x, states = self.encoder(frames), []
        for place in self.places:
            x = place(x, mask)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask.squeeze(-1))
            states.append(x)
        return [states[len(states) // 2 - 1], self.norm(x)]


class StateSpace(Recogniser):
    """Linear recurrent units, every second one from the end to the beginning."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.widths = (width, width)
        self.encoder = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(
            LRUBlock(width, width, dropout=DROPOUT, min_radius=0.5, max_radius=0.99) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def states(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        backwards = reversal(frames.shape[1], lengths).unsqueeze(-1)  # (B, T, 1)
        x, states = self.encoder(frames), []
        for k, layer in enumerate(self.layers):
            if k % 2:
                order = backwards.expand_as(x)
                x = layer(x.gather(1, order)).gather(1, order)
            else:
                x = layer(x)
            states.append(x)
        return [states[len(states) // 2 - 1], self.norm(x)]


def reversal(frames: int, lengths: Tensor) -> Tensor:
    """(B, T): each utterance's frames from its last to its first; those beyond stay where they are."""
    place = torch.arange(frames).expand(len(lengths), frames)
    mirrored = lengths[:, None] - 1 - place
    return torch.where(mirrored >= 0, mirrored, place)


TEACHERS: dict[str, Callable[[], Recogniser]] = {
    "convolutional": lambda: Convolutional(WIDTH, (1, 1, 2, 2, 4, 4, 8, 8)),
    "transformer": lambda: Attentive(WIDTH, 4),
    "state-space": lambda: StateSpace(WIDTH, 6),
    "recurrent": lambda: Recurrent(160, 2),
}


def student() -> Convolutional:
    return Convolutional(WIDTH, (1, 2, 4))


def adapt(model: nn.Module, rank: int, backend: str) -> None:
    """Freeze the model and put a low-rank adapter on each of its linear layers, in place; its outputs stay."""
    model.requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear.from_linear(layer, rank, alpha=2.0 * rank, backend=backend))
