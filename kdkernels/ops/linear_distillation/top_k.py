"""A teacher that is not there: the k most probable tokens of each point, computed once and kept in a file."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.contract import Contract, check_choice, check_count, is_whole, show
from kdkernels.ops.linear_distillation.call import Head, Side, accumulation_dtype
from kdkernels.ops.linear_distillation.reference import logits

TAILS = ("uniform", "renormalise")
FORMAT = "kdkernels.topk_teacher/1"
ROOM = 64 * 2**20  # bytes of logits at a time
SLACK = 1e-3  # by which rounded probabilities may add up to more than 1


@dataclass(frozen=True)
class TopKTeacher:
    """Log-probabilities of the k most probable tokens of each point, a teacher of `linear_distillation_loss`.

    Attributes:
        log_probs: (..., k), at temperature 1, natural logarithms; floating-point, of numbers that add up to 1 at most.
        indices: (..., k) int32 or int64, the tokens; each at most once in a point.
        vocabulary: V of the teacher.
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

    def __post_init__(self) -> None:
        _check(self)

    @property
    def k(self) -> int:
        """How many tokens of each point are known."""
        return self.log_probs.shape[-1]

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file (needs the package `safetensors`), whole or not at all.

        Args:
            path: an existing file is replaced.
            metadata: what else to keep in the file's header, such as the teacher's name.
        """
        save = _safetensors().torch.save
        kept = {"format": FORMAT, "vocabulary": str(self.vocabulary), "tail": self.tail}
        tensors = {"log_probs": self.log_probs, "indices": self.indices}
        content = save(
            {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, kept | dict(metadata or {}) | kept
        )
        target = Path(path)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

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
        if kept.get("format") != FORMAT or set(tensors) != {"log_probs", "indices"}:
            raise ValueError(
                f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}, but is no file of TopKTeacher.save"
            )
        try:
            return cls(tensors["log_probs"], tensors["indices"], int(kept["vocabulary"]), kept["tail"])
        except (TypeError, ValueError, KeyError) as error:
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
    head = teacher_head if isinstance(teacher_head, Head) or teacher_head is None else Head(teacher_head)
    tensors: dict[str, Any] = {"teacher": teacher}
    if head is not None:
        tensors |= {f"teacher_head.{name}": getattr(head, name) for name in ("weight", "bias", "lora_A", "lora_B")}
    shapes = ("... d_t", "V d_t", "V?", "r d_t?", "V r?")
    sizes = Contract(**dict(zip(tensors, shapes, strict=False))).bind(tensors)
    V = sizes["d_t"] if head is None else sizes["V"]
    if V < 1:
        raise ValueError(f"teacher has a vocabulary of {V}, but must have at least one token")
    points = teacher.reshape(-1, teacher.shape[-1]) if teacher.numel() else teacher.new_empty(0, teacher.shape[-1])
    dtype = accumulation_dtype(*tensors.values())
    k = min(k, V)
    log_probs = teacher.new_empty((len(points), k), dtype=dtype)
    indices = teacher.new_empty((len(points), k), dtype=torch.int32)
    for start in range(0, len(points), rows := max(1, ROOM // (8 * V))):
        block = slice(start, start + rows)
        y = logits(side_of(points[block], head), dtype)
        best, places = y.topk(k, dim=-1)
        log_probs[block] = best - y.logsumexp(-1, keepdim=True)
        indices[block] = places
    shape = (*sizes["..."], k)
    return TopKTeacher(log_probs.reshape(shape), indices.reshape(shape), V, tail)


def side_of(states: Tensor, head: Head | None) -> Side:
    """Points (N, d) and their head, without its adapter's dropout."""
    if head is None:
        return Side(states, vocabulary=states.shape[-1])
    low = None
    if head.lora_A is not None:
        wide = accumulation_dtype(states, head.lora_A)
        low = head.scaling * (states.to(wide) @ head.lora_A.to(wide).T)
    return Side(
        states, head.weight, head.bias, low, head.lora_B, scale=head.scale, softcap=head.softcap or 0.0,
        vocabulary=head.weight.shape[0],
    )  # fmt: skip


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
    if not (is_whole(V) and V >= 1):
        raise ValueError(f"vocabulary is {V!r}, but must be a whole number of at least 1")
    if log_probs.shape != indices.shape or log_probs.dim() < 1:
        raise ValueError(
            f"log_probs has shape {show(log_probs.shape)} and indices {show(indices.shape)}, but both must be (..., k)"
        )
    if not 1 <= log_probs.shape[-1] <= V:
        raise ValueError(f"log_probs has k = {log_probs.shape[-1]}, but must have 1 to {V}, the vocabulary")
    if not log_probs.numel() or log_probs.device.type == "meta":
        return
    if log_probs.isnan().any():
        raise ValueError("log_probs holds NaN")
    sums = log_probs.double().exp().sum(-1)
    if (log_probs > SLACK).any() or (sums > 1 + SLACK).any():
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
