"""The options of a distillation, checked when they are written down."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdkernels.contract import check_choice, check_number
from kdkernels.nn import LinearDistillation, ProjectionAlignment
from kdkernels.ops.linear_distillation.vocabulary import Vocabularies

STATES = ("decoder", "encoder")


class Model(Protocol):
    """What is asked of a student or a teacher."""

    def width(self, states: str) -> int: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Distillation:
    """What a student learns from its teachers.

    Attributes:
        temperature, divergence, beta, mixture, vocab_map: of the soft targets, as in `kdkernels.nn.LinearDistillation`.
        alpha: from 0 to 1, the share of the soft targets; the rest is the cross-entropy of the labels.
        teacher_weights: one number of at least 0 for each teacher, 1 in sum; equal when None. Of the alignment too.
        soft_weight: of the soft targets and the hard labels that they are mixed with.
        alignment_weight: of the projection alignment; above 0 it needs pairs and embedding_width.
        pairs: (student layer, teacher layer) of hidden states; 0 is the embeddings, −1 the last layer.
        embedding_width: D of the shared space.
        metric: `"cosine"`, `"mse"` or `"angular"`.
        student_projection, teacher_projection, resample: as in `kdkernels.nn.ProjectionAlignment`. A teacher's learned
            projection lets the shared space collapse, hence `"orthogonal"`.
        states: `"decoder"` or `"encoder"`: whose hidden states are aligned in a seq2seq model.
        shift_labels: whether the label of a state is the next token's; None goes by the student's class.
        backend: of both losses.

    Raises:
        TypeError, ValueError: an option does not fit; the message names it.
    """

    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    alpha: float = 1.0
    mixture: str = "arithmetic"
    teacher_weights: Sequence[float] | Tensor | None = None
    vocab_map: Vocabularies = None
    soft_weight: float = 1.0
    alignment_weight: float = 0.0
    pairs: Sequence[tuple[int, int]] = ()
    embedding_width: int | None = None
    metric: str = "cosine"
    student_projection: str = "learned"
    teacher_projection: str = "orthogonal"
    resample: bool = False
    states: str = "decoder"
    shift_labels: bool | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        self.soft_targets()
        for name in ("soft_weight", "alignment_weight"):
            check_number(name, getattr(self, name))
            if getattr(self, name) == float("inf"):
                raise ValueError(f"{name} is inf, but must be finite")
        if self.soft_weight == self.alignment_weight == 0:
            raise ValueError("soft_weight and alignment_weight are 0, but one must be above")
        check_choice("states", self.states, STATES)
        for name in ("resample", "shift_labels"):
            if not isinstance(getattr(self, name), bool) and (name, self.shift_labels) != ("shift_labels", None):
                raise TypeError(f"{name} is {getattr(self, name)!r}, but must be True or False")
        if self.alignment_weight > 0:
            if self.embedding_width is None:
                raise ValueError("embedding_width is None, but must be given: alignment_weight is above 0")
            self._alignment(self.embedding_width, self.embedding_width, "meta")
        elif self.pairs:
            raise ValueError("pairs was given, but alignment_weight is 0: it must be above, or pairs empty")

    def soft_targets(self) -> LinearDistillation:
        """The sum of the losses of all points that count."""
        return LinearDistillation(
            divergence=self.divergence,
            temperature=self.temperature,
            beta=self.beta,
            alpha=self.alpha,
            teacher_weights=self.teacher_weights,
            mixture=self.mixture,
            vocab_map=self.vocab_map,
            reduction="sum",
            backend=self.backend,
        )

    def alignments(self, student: Model, teachers: Sequence[Model]) -> "Alignments | None":
        """Of the student and each teacher, or None where alignment has no weight."""
        if not self.alignment_weight:
            return None
        weights = self.soft_targets().teacher_weights or (1 / len(teachers),) * len(teachers)
        widths = [(student.width(self.states), teacher.width(self.states)) for teacher in teachers]
        return Alignments([self._alignment(*pair) for pair in widths], weights)

    def check_teachers(self, K: int) -> None:
        """Raise ValueError unless there is one entry for each of K teachers, where these are listed."""
        for name in ("teacher_weights", "vocab_map"):
            entries = getattr(self, name)
            alone = entries is None or isinstance(entries, str) or (name == "vocab_map" and isinstance(entries, Tensor))
            if not alone and len(entries) != K:
                raise ValueError(f"{name} has {len(entries)} entries, but must have one for each of {K} teachers")

    def _alignment(self, student_width: int, teacher_width: int, device: str | None = None) -> ProjectionAlignment:
        assert self.embedding_width is not None
        return ProjectionAlignment(
            self.pairs,
            student_width,
            teacher_width,
            self.embedding_width,
            metric=self.metric,
            student_projection=self.student_projection,
            teacher_projection=self.teacher_projection,
            resample=self.resample,
            backend=self.backend,
            device=device,
        )


class Alignments(nn.Module):
    """The weighted mean of the alignments with each teacher."""

    def __init__(self, alignments: Sequence[ProjectionAlignment], weights: Sequence[float]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(alignments)
        self.weights = tuple(weights)

    def forward(self, student_states: Any, teacher_states: Sequence[Any], mask: Tensor | None) -> Tensor:
        """A scalar, of the hidden states by layer of the student and of each teacher."""
        return torch.stack(
            [
                weight * alignment(student_states, states, mask)
                for weight, alignment, states in zip(self.weights, self.teachers, teacher_states, strict=True)
                if weight > 0
            ]
        ).sum()

    def extra_repr(self) -> str:
        return f"weights=({', '.join(f'{w:.3g}' for w in self.weights)})"
