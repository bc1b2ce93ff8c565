"""A teacher that is not there: the k most probable tokens of each point, computed once and kept in a file."""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.contract import check_choice, check_count, is_whole, show
from kdkernels.ops.linear_distillation.call import accumulation_dtype
from kdkernels.ops.linear_distillation.head import Head, as_head, check_head, side_of
from kdkernels.ops.linear_distillation.reference import NONE, logits

TAILS = ("uniform", "renormalise")
FORMAT = "kdkernels.topk_teacher/1"
MOST = 2**31 - 1  # tokens of a vocabulary
ROOM = 64 * 2**20  # bytes of logits at a time
SLACK = 0.05  # by which probabilities may add up to more than 1: logarithms may once have been bfloat16


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """Log-probabilities of the k most probable tokens of each point, a teacher of `linear_distillation_loss`.

    Attributes:
        log_probs: (..., k), at temperature 1, natural logarithms; floating-point, of numbers that add up to 1 at most.
        indices: (..., k) int32 or int64, the tokens; each at most once in a point.
        vocabulary: V of the teacher.
        rest: (...), the logarithm of what all other tokens have together. None: 1 less the sum, which float32
            cannot tell from 0 where the teacher is certain to seven digits.
        tail: what becomes of the rest of the probability. `"uniform"` spreads it evenly over the other tokens;
            `"renormalise"` gives the others none, and the k what they have over their sum.

    At temperature T the target is softmax(log p / T) of the distribution that this describes.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes, values or the vocabulary do not fit; the message names the attribute.
    """

    log_probs: Tensor
    indices: Tensor
    vocabulary: int
    tail: str = "uniform"
    rest: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def k(self) -> int:
        """How many tokens of each point are known."""
        return self.log_probs.shape[-1]

    def __getitem__(self, points: Any) -> "TopKTeacher":
        """Of some of the points, by what indexes the leading dimensions: a batch of an epoch."""
        return self._with(*(None if x is None else x[points] for x in (self.log_probs, self.indices, self.rest)))

    def to(self, device: torch.device | str) -> "TopKTeacher":
        """On another device."""
        tensors = (self.log_probs, self.indices, self.rest)
        return self._with(*(None if x is None else x.to(device) for x in tensors))

    def _with(self, log_probs: Any, indices: Any, rest: Any) -> "TopKTeacher":
        """What was checked is not checked again."""
        found = object.__new__(TopKTeacher)
        found.__dict__.update(vars(self) | {"log_probs": log_probs, "indices": indices, "rest": rest})
        return found

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file (needs the package `safetensors`), whole or not at all.

        Args:
            path: an existing file is replaced.
            metadata: what else to keep in the file's header, such as the teacher's name.
        """
        kept = {"format": FORMAT, "vocabulary": str(self.vocabulary), "tail": self.tail}
        tensors = {"log_probs": self.log_probs, "indices": self.indices, "rest": self.rest}
        present = {name: x.detach().cpu().contiguous() for name, x in tensors.items() if x is not None}
        content = _safetensors().torch.save(present, dict(metadata or {}) | kept)
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent} is no folder, but {target.name} was to be written there")
        # a name of its own for each writer, and the rights that a file is made with
        descriptor, temporary = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".tmp", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TopKTeacher":
        """Read what `save` wrote.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it is cut short, is no such file, or holds what a teacher cannot; the message names it.
        """
        content = Path(path).read_bytes()
        try:
            tensors = _safetensors().torch.load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            kept = header.get("__metadata__", {})
        except (_safetensors().SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is no safetensors file, or was cut short: {error}") from error
        if kept.get("format") != FORMAT or {"log_probs", "indices"} - set(tensors):
            raise ValueError(
                f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}, but is no file of TopKTeacher.save"
            )
        size = kept.get("vocabulary", "")
        try:
            if not (size.isdecimal() and len(size) < 12):
                raise ValueError(f"vocabulary is {size!r}, but must be a whole number")
            return cls(tensors["log_probs"], tensors["indices"], int(size), kept.get("tail", ""), tensors.get("rest"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


@torch.no_grad()
def topk_teacher(
    teacher: Tensor, teacher_head: Tensor | Head | None = None, *, k: int, tail: str = "uniform"
) -> TopKTeacher:
    """The k most probable tokens of each point, for `linear_distillation_loss` now or, through a file, later.

    Args:
        teacher: (..., d_t) hidden states, or (..., V) logits.
        teacher_head: as in `linear_distillation_loss`; None for logits.
        k: at least 1; more than the vocabulary has is all of it.
        tail: see `TopKTeacher`.

    Returns:
        log_probs in float32 (float64 of float64) and indices in int32, (..., k), the most probable first. Memory
        beyond them does not grow with the number of points.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_count("k", k)
    check_choice("tail", tail, TAILS)
    head = as_head("teacher_head", teacher_head)
    sizes = check_head("teacher", "teacher_head", teacher, head)
    V, leading = sizes["V"], sizes["..."]
    points = teacher.reshape(prod(leading), teacher.shape[-1])
    dtype = accumulation_dtype(teacher, *(head or ())[:4])
    if head is not None:  # once, not for each block
        held = [None if x is None else x.to(dtype) for x in head[:4]]
        head = Head(*held, head.scaling, 0.0, head.scale, head.softcap)  # type: ignore
    k = min(k, V)
    log_probs = teacher.new_empty((len(points), k), dtype=dtype)
    indices = teacher.new_empty((len(points), k), dtype=torch.int32)
    rest = teacher.new_empty(len(points), dtype=dtype)
    rows = max(1, ROOM // (8 * V))
    device = teacher.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        for start in range(0, len(points), rows):
            block = points[start : start + rows]
            y = logits(side_of(block.to(dtype), head, len(block), None), dtype)
            best, places = y.topk(k, dim=-1)
            all_of_it = y.logsumexp(-1, keepdim=True)
            log_probs[start : start + rows] = best - all_of_it
            indices[start : start + rows] = places
            y.scatter_(1, places, NONE)
            rest[start : start + rows] = (y.logsumexp(-1, keepdim=True) - all_of_it)[:, 0]
    shape = (*leading, k)
    return TopKTeacher(log_probs.reshape(shape), indices.reshape(shape), V, tail, rest.reshape(leading))


def _check(teacher: TopKTeacher) -> None:
    log_probs, indices, V = teacher.log_probs, teacher.indices, teacher.vocabulary
    check_choice("tail", teacher.tail, TAILS)
    for name, x in (("log_probs", log_probs), ("indices", indices)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}, but must be a torch.Tensor")
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs has dtype {log_probs.dtype}, but must be floating-point")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices has dtype {indices.dtype}, but must be int32 or int64")
    if not (is_whole(V) and 1 <= V <= MOST):
        raise ValueError(f"vocabulary is {V!r}, but must be a whole number from 1 to {MOST}")
    if log_probs.shape != indices.shape or log_probs.dim() < 1:
        raise ValueError(
            f"log_probs has shape {show(log_probs.shape)} and indices {show(indices.shape)}, but both must be (..., k)"
        )
    if not 1 <= log_probs.shape[-1] <= V:
        raise ValueError(f"log_probs has k = {log_probs.shape[-1]}, but must have 1 to {V}, the vocabulary")
    rest = teacher.rest
    if rest is not None:
        if not (isinstance(rest, Tensor) and rest.is_floating_point()):
            raise TypeError("rest must be a floating-point torch.Tensor or None")
        if rest.shape != log_probs.shape[:-1]:
            raise ValueError(f"rest has shape {show(rest.shape)}, but must be {show(log_probs.shape[:-1])}")
    if not log_probs.numel() or log_probs.device.type == "meta":
        return
    for name, numbers in (("log_probs", log_probs), ("rest", rest)):
        if numbers is not None and numbers.isnan().any():
            raise ValueError(f"{name} holds NaN")
    sums = log_probs.double().exp().sum(-1)
    if (sums > 1 + SLACK).any() or (rest is not None and (sums + rest.double().exp() > 1 + SLACK).any()):
        raise ValueError(
            f"log_probs are of probabilities that add up to {sums.max().item():.4g}, but must not exceed 1"
        )
    if (sums == 0).any():
        raise ValueError("log_probs has a point without a token of any probability")
    if indices.min() < 0 or indices.max() >= V:
        found = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(f"indices holds {found.item()}, but must be at least 0 and below {V}, the vocabulary")
    ordered = indices.sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError("indices has a point that names a token twice")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("a TopKTeacher's file needs the package safetensors: pip install safetensors") from error
    return safetensors


def _umask() -> int:
    """What new files' rights leave out; it can only be read by setting it."""
    found = os.umask(0o022)
    os.umask(found)
    return found
