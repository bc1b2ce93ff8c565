"""What teachers and students see: images of any data set of `compress`, or definitions of WordNet's nouns."""

import dataclasses
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from kdtrainer.compress import sequences
from kdtrainer.errors import RunError
from kdtrainer.subspace import minilm
from kdtrainer.subspace.config import WORDNET, Config

DIGIT = 64  # pixels
PACKAGE = "wordnet-base"
TRAIN, TEST = 400, 100  # definitions of each class
SPLIT_SEED = 0  # one test set for all runs: no seed of a run may move an example into or out of it
TOPS = 3  # the lexicographer file of the roots of all nouns, a class of its own


@dataclasses.dataclass(frozen=True)
class Examples:
    """Inputs are images (N, c, side, side) of mean 0 and mean square 1, or MiniLM's tokens (N, T) of texts."""

    train: Tensor
    train_labels: Tensor  # (N,)
    test: Tensor
    test_labels: Tensor
    classes: int


def load(config: Config) -> Examples:
    """Raises RunError, naming what is wrong."""
    found = wordnet() if config.data == WORDNET else images(config.data)
    if not config.examples or config.examples >= len(found.train):
        return found
    some = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(SPLIT_SEED))[: config.examples]
    return dataclasses.replace(found, train=found.train[some], train_labels=found.train_labels[some])


def images(name: str) -> Examples:
    """scikit-learn's digits, Fashion-MNIST, or a .npz file of square images."""
    found = sequences.load(name, DIGIT, (WORDNET,))
    pixels, channels = found.train.shape[1:]
    side = round(pixels**0.5)
    if side * side != pixels or side % 4:
        raise RunError(
            f"--data {name} has images of {pixels} pixels, but must have square ones, with a side that 4 divides"
        )

    def squares(x: Tensor) -> Tensor:
        return x.mT.reshape(len(x), channels, side, side).contiguous()

    return Examples(
        squares(found.train), found.train_labels, squares(found.test), found.test_labels, classes=found.classes
    )


def wordnet() -> Examples:
    """Definitions, and which of WordNet's topics (its lexicographer files) each belongs to: as many of each topic.

    Topics are those with a thousand definitions.
    """
    (path,) = sequences.packaged(PACKAGE, ["data.noun"])
    by_topic = definitions(path)
    topics = sorted(topic for topic, found in by_topic.items() if len(found) >= 1000 and topic != TOPS)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, topic in enumerate(topics):
        order = torch.randperm(len(by_topic[topic]), generator=generator)[: TRAIN + TEST].tolist()
        chosen = [(by_topic[topic][i], label) for i in order]
        parts["train"] += chosen[:TRAIN]
        parts["test"] += chosen[TRAIN:]
    tokens = minilm.tokens([text for part in parts.values() for text, _ in part])  # (N, T)
    train, test = tokens.split([len(part) for part in parts.values()])
    labels = [torch.tensor([label for _, label in part]) for part in parts.values()]
    return Examples(train, labels[0], test, labels[1], len(topics))


def definitions(path: Path) -> dict[int, list[str]]:
    """By topic; those that belong to several are left out.

    A line is `offset topic … | definition; "example"`; the licence above is indented.
    """
    found: dict[int, set[str]] = {}
    try:
        for line in path.read_text().splitlines():
            if not line.startswith("  "):
                head, _, gloss = line.partition(" | ")
                found.setdefault(int(head.split()[1]), set()).add(gloss.partition('; "')[0].strip())
    except (OSError, ValueError, IndexError) as error:
        raise RunError(f"{path} is no data file of WordNet: {error}") from error
    topics = Counter(text for texts in found.values() for text in texts)
    return {topic: sorted(text for text in texts if topics[text] == 1) for topic, texts in found.items()}
