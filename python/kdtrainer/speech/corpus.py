"""Utterances as features and text, kept in a cache of small files: whole ones stay, missing and damaged ones are made.

A file is a function of what its name says. Whoever is interrupted goes on with the files that are not there yet.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdtrainer import checkpoint
from kdtrainer.errors import RunError
from kdtrainer.speech import features, folder, synthesis, text

SHARD = 50  # utterances in a file
FORMAT = 1  # of features and files; another number makes all files anew


@dataclass(frozen=True)
class Source:
    """What the utterances of one file are made from, in plain values: its name has a digest of them."""

    split: str
    number: int
    made_from: tuple[dict[str, Any], ...]  # `synthesis.Utterance`, or `folder.Recording`, each as a dict

    def path(self, cache: Path) -> Path:
        said = json.dumps([FORMAT, version("espeakng-loader"), self.made_from], sort_keys=True)
        return cache / f"{self.split}-{self.number:04d}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"


@dataclass(frozen=True)
class Batch:
    """(B, T, FEATURES) frames of B lengths, and the characters of all texts, one after the other, of B counts."""

    frames: Tensor
    lengths: Tensor
    characters: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Utterances:
    """(T, FEATURES) and a text for each."""

    frames: list[Tensor]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: Sequence[int]) -> Batch:
        lengths = torch.tensor([len(self.frames[i]) for i in indices])
        characters = [text.encode(self.texts[i]) for i in indices]
        counts = torch.tensor([len(each) for each in characters])
        return Batch(
            pad_sequence([self.frames[i] for i in indices], batch_first=True), lengths, torch.cat(characters), counts
        )


def synthetic(split: str, count: int, seed: int) -> list[Source]:
    return sources(split, [asdict(synthesis.draw(split, k, seed)) for k in range(count)])


def sources(split: str, made_from: Sequence[dict[str, Any]]) -> list[Source]:
    return [Source(split, k // SHARD, tuple(made_from[k : k + SHARD])) for k in range(0, len(made_from), SHARD)]


def is_whole(path: Path) -> bool:
    """Whether the file is there as it was written. A damaged one is removed, and says so."""
    if not path.exists():
        return False
    try:
        checkpoint.read(path)
    except RunError:
        print(f"{path} was damaged: it is made again")
        path.unlink()
        return False
    return True


def make(source: Source, cache: Path) -> None:
    """Write the source's file."""
    said, frames = [], []
    for values in source.made_from:
        recorded = "path" in values
        wave, rate = folder.read(values) if recorded else synthesis.render(synthesis.Utterance(**values))
        frames.append(features.of_wave(torch.from_numpy(wave), rate))
        said.append(values["text"])
    tensors = {"frames": torch.cat(frames), "lengths": torch.tensor([len(each) for each in frames])}
    checkpoint.write(source.path(cache), tensors, {"texts": said})


def load(paths: Sequence[Path]) -> Utterances:
    """What the files hold, which must be there. Utterances too short for their text are left out."""
    frames: list[Tensor] = []
    texts: list[str] = []
    for path in paths:
        tensors = checkpoint.read(path)
        frames += tensors["frames"].split(tensors["lengths"].tolist())
        texts += checkpoint.value_of(path, "texts")
    fits = [k for k, said in enumerate(texts) if len(frames[k]) >= text.frames_needed(said) > 0]
    return Utterances([frames[k] for k in fits], [texts[k] for k in fits])
