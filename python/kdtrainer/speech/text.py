"""Characters as classes, CTC's best path, and word error rates."""

from collections.abc import Sequence
from itertools import pairwise

import jiwer
import torch
from torch import Tensor

BLANK = 0
CHARACTERS = " abcdefghijklmnopqrstuvwxyz'"
CLASSES = 1 + len(CHARACTERS)
CLASS_OF = {character: 1 + k for k, character in enumerate(CHARACTERS)}


def normalised(text: str) -> str:
    """Lower case, words apart by one space; characters that are no letters are spaces."""
    return " ".join("".join(c if c in CLASS_OF else " " for c in text.lower().replace("’", "'")).split())


def encode(text: str) -> Tensor:
    """(characters,)"""
    return torch.tensor([CLASS_OF[character] for character in text], dtype=torch.int64)


def frames_needed(text: str) -> int:
    """By CTC: one for each character, and a blank between equal neighbours."""
    return len(text) + sum(a == b for a, b in pairwise(text))


def greedy(logits: Tensor, length: int) -> str:
    """(T, CLASSES) -> the best path's text: repetitions once, no blanks."""
    path = logits[:length].argmax(-1).unique_consecutive()
    return normalised("".join(CHARACTERS[k - 1] for k in path.tolist() if k != BLANK))


def word_error_rate(references: Sequence[str], found: Sequence[str]) -> float:
    return float(jiwer.wer(list(references), list(found)))
