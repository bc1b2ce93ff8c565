"""Soft targets as a module, which takes heads as models have them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.backend import BACKENDS
from kdkernels.contract import check_choice, is_whole, show
from kdkernels.nn.heads import head_of
from kdkernels.ops.linear_distillation import Head, linear_distillation_loss
from kdkernels.ops.linear_distillation.api import REDUCTIONS
from kdkernels.ops.linear_distillation.arguments import Teacher, as_shares
from kdkernels.ops.linear_distillation.head import check_range
from kdkernels.ops.linear_distillation.reference import DIVERGENCES, MIXTURES
from kdkernels.ops.linear_distillation.vocabulary import TRUNCATE, Vocabularies

AnyHead = Tensor | Head | nn.Module | None


class LinearDistillation(nn.Module):
    """Soft targets of one teacher or several, from hidden states and heads: `kdkernels.linear_distillation_loss`.

    It has no parameters. Heads that are modules are read by `kdkernels.nn.head_of`, with their adapters.

    Args:
        divergence: `"forward_kl"`, `"reverse_kl"`, `"jsd"` or `"tvd"`.
        temperature: above 0.
        beta: of the JSD, above 0 and below 1.
        alpha: from 0 to 1, the share of the soft targets; below 1, `forward` needs labels.
        teacher_weights: one number of at least 0 for each teacher, 1 in sum; equal shares when None.
        mixture: `"arithmetic"` or `"geometric"`.
        vocab_map: `"truncate"`, (V,) int32 or int64 for all teachers, or a list of these or None, one for each. Tensors
            are kept as buffers that are not in the `state_dict`: they follow the module to its device.
        ignore_index: the label of points that do not count.
        reduction: `"mean"`, `"sum"` or `"none"`.
        backend: as in `linear_distillation_loss`.

    Raises:
        TypeError: an option has the wrong type or dtype; the message names it.
        ValueError: an option does not fit; likewise.
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        temperature: float = 1.0,
        beta: float = 0.5,
        alpha: float = 1.0,
        teacher_weights: Sequence[float] | Tensor | None = None,
        mixture: str = "arithmetic",
        vocab_map: Vocabularies = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("divergence", divergence, DIVERGENCES)
        check_choice("mixture", mixture, MIXTURES)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("backend", backend, BACKENDS)
        check_range("temperature", temperature, 0, float("inf"), "above 0 and finite")
        check_range("beta", beta, 0, 1, "above 0 and below 1")
        check_range("alpha", alpha, 0, 1, "from 0 to 1", closed=True)
        if not is_whole(ignore_index):
            raise TypeError(f"ignore_index is {ignore_index!r}, but must be a whole number")
        self.divergence = divergence
        self.temperature = float(temperature)
        self.beta = float(beta)
        self.alpha = float(alpha)
        self.teacher_weights = _checked_shares(teacher_weights)
        self.mixture = mixture
        self.ignore_index = int(ignore_index)
        self.reduction = reduction
        self.backend = backend
        self._maps = self._keep(vocab_map)

    def forward(
        self,
        student_states: Tensor,
        student_head: AnyHead,
        teacher_states: Teacher | Sequence[Teacher],
        teacher_heads: AnyHead | Sequence[AnyHead] = None,
        *,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            student_states: (..., d_s), or (..., V) logits where there is no head.
            student_head: (V, d_s), a `Head`, a module that `head_of` reads, or None.
            teacher_states: (..., d_t), logits, a `TopKTeacher`, or a list of these.
            teacher_heads: of each teacher, likewise; None for those without.
            labels: (...) integers.
            weights: (...), one per point, or a boolean mask.

        Returns:
            A scalar, or (...) where the reduction is `"none"`; float32 or, where any argument is float64, float64.

        Raises:
            TypeError: an argument has the wrong type or dtype, or a module is not one that `head_of` reads.
            ValueError: shapes do not fit, or a module does what a head cannot; the message names the argument.
        """
        several = isinstance(teacher_heads, (list, tuple)) and not isinstance(teacher_heads, Head)
        heads: Any = teacher_heads
        if several:
            heads = [_read(f"teacher_heads[{k}]", head) for k, head in enumerate(heads)]
        else:
            heads = _read("teacher_heads", heads)
        return linear_distillation_loss(
            student_states,
            _read("student_head", student_head),
            teacher_states,
            heads,
            labels=labels,
            divergence=self.divergence,
            temperature=self.temperature,
            beta=self.beta,
            alpha=self.alpha,
            teacher_weights=self.teacher_weights,
            mixture=self.mixture,
            vocab_map=self.vocab_map,
            weights=weights,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
        )

    @property
    def vocab_map(self) -> Vocabularies:
        """As it was given, on the module's device."""
        if not isinstance(self._maps, list):
            return getattr(self, self._maps) if self._maps in self._buffers else self._maps
        return [None if name is None else getattr(self, name) for name in self._maps]

    def extra_repr(self) -> str:
        shown = [f"divergence={self.divergence!r}", f"temperature={self.temperature:g}"]
        shown += [f"beta={self.beta:g}"] if self.divergence == "jsd" else []
        shown += [f"alpha={self.alpha:g}"]
        if self.teacher_weights is not None:
            shown.append(f"teacher_weights=({', '.join(f'{w:.3g}' for w in self.teacher_weights)})")
        shown += [f"mixture={self.mixture!r}"] if self.mixture != "arithmetic" else []
        shown += [f"vocab_map={_shown(self.vocab_map)}"] if self._maps is not None else []
        defaults = {"ignore_index": -100, "reduction": "mean", "backend": "auto"}
        shown += [f"{name}={getattr(self, name)!r}" for name, usual in defaults.items() if getattr(self, name) != usual]
        return ", ".join(shown)

    def _keep(self, vocab_map: Any) -> str | list[str | None] | None:
        """The names of the buffers of `vocab_map`, or what it is without any."""
        if vocab_map is None or isinstance(vocab_map, str):
            if vocab_map not in (None, TRUNCATE):
                raise ValueError(f"vocab_map is {vocab_map!r}, but must be tensors, {TRUNCATE!r} or None")
            return vocab_map
        if isinstance(vocab_map, Tensor):
            return self._keep_one("vocab_map", "vocabulary", vocab_map)
        if not isinstance(vocab_map, (list, tuple)):
            raise TypeError(f"vocab_map is {type(vocab_map).__name__}, but must be tensors, {TRUNCATE!r} or None")
        if not vocab_map:
            raise ValueError("vocab_map is empty, but must have one entry for each teacher")
        return [
            None if columns is None else self._keep_one(f"vocab_map[{k}]", f"vocabulary_{k}", columns)
            for k, columns in enumerate(vocab_map)
        ]

    def _keep_one(self, called: str, name: str, columns: Any) -> str:
        if not isinstance(columns, Tensor):
            raise TypeError(f"{called} is {type(columns).__name__}, but must be a torch.Tensor or None")
        if columns.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{called} has dtype {columns.dtype}, but must be int32 or int64")
        if columns.dim() != 1:
            raise ValueError(f"{called} has shape {show(columns.shape)}, but must be (V)")
        self.register_buffer(name, columns, persistent=False)
        return name


def _read(name: str, head: AnyHead) -> Any:
    if not isinstance(head, nn.Module):
        return head
    try:
        return head_of(head)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _checked_shares(teacher_weights: Any) -> tuple[float, ...] | None:
    if teacher_weights is None:
        return None
    try:
        count = len(teacher_weights)
    except TypeError:
        raise TypeError(f"teacher_weights is {teacher_weights!r}, but must hold one number for each teacher") from None
    if not count:
        raise ValueError("teacher_weights is empty, but must hold one number for each teacher")
    return as_shares(teacher_weights, count)


def _shown(vocab_map: Any) -> str:
    if isinstance(vocab_map, Tensor):
        return f"<{len(vocab_map)} tokens>"
    if isinstance(vocab_map, list):
        return f"[{', '.join(map(_shown, vocab_map))}]"
    return repr(vocab_map)
