"""Layer-wise distillation as a module: many pairs of layers, their projections and what draws them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from kdkernels.backend import BACKENDS
from kdkernels.contract import check_choice, check_count, check_tensor, is_whole, show
from kdkernels.nn.frozen_projection import FrozenProjection, check_seed, draw_projection
from kdkernels.ops.projection_alignment import projection_alignment_loss
from kdkernels.ops.projection_alignment.method import METHODS
from kdkernels.ops.projection_alignment.reference import METRICS

Widths = int | Sequence[int] | Mapping[int, int]

STUDENT_PROJECTIONS = ("learned", "none")
TEACHER_PROJECTIONS = ("learned", "orthogonal", "johnson_lindenstrauss", "none")


class ProjectionAlignment(torch.nn.Module):
    """Layer-wise distillation: student and teacher hidden states aligned in shared D-dimensional spaces.

    For each pair k = (i, j) of a student and a teacher layer, L_k is `kdkernels.projection_alignment_loss` of
    `student_states[i]` and `teacher_states[j]`, averaged over the points that count. The module returns
    Σ_k w_k L_k / Σ_k w_k. Points are frames, tokens or rows: all dimensions but the last.

    Args:
        pairs: (student layer, teacher layer) indices into the states that `forward` is given; negative ones count
            from the end.
        student_widths: d_s, one for all layers, or by layer: anything that `student_widths[layer]` answers.
        teacher_widths: d_t, likewise.
        embedding_width: D.
        metric: `"cosine"`, `"mse"` or `"angular"`, as in `projection_alignment_loss`.
        layer_weights: w, non-negative, one per pair and not all 0; only their ratios matter. Equal when None. A pair
            of weight 0 is not computed.
        student_projection: `"learned"`, or `"none"` when the student's states already live in D.
        teacher_projection: `"learned"`; `"none"`; or frozen, for which a learned projection cannot collapse the
            teacher's space: `"orthogonal"` has orthonormal columns (rows, when D < d_t), uniformly distributed
            (Mezzadri, arXiv math-ph/0609050); `"johnson_lindenstrauss"` has entries from N(0, 1/D), which keeps
            inner products in expectation (the frozen subspace of arXiv 2512.23410).
        shared: one projection per side for all pairs, in place of one per pair; each projected side then needs equal
            widths.
        bias: learned projections add a bias.
        resample: teacher states (..., T_t, d_t) whose number of frames is not the student's T_s are brought to it by
            linear interpolation along time, as `torch.nn.functional.interpolate(mode="linear")` does.
        seed: of the frozen projections. They are drawn on the CPU from a generator of their own, leave torch's
            alone, and are not in the `state_dict`: a module that loads one must be built with the same seed.
        method: as in `projection_alignment_loss`.
        backend: as in `projection_alignment_loss`.
        device: of the projections.
        dtype: of the projections.

    Raises:
        TypeError: pairs, a width or the seed has the wrong type; the message names the argument.
        ValueError: an option or a width does not fit; likewise.
    """

    layer_weights: tuple[float, ...]

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        student_widths: Widths,
        teacher_widths: Widths,
        embedding_width: int,
        *,
        metric: str = "cosine",
        layer_weights: Sequence[float] | None = None,
        student_projection: str = "learned",
        teacher_projection: str = "learned",
        shared: bool = False,
        bias: bool = False,
        resample: bool = False,
        seed: int = 0,
        method: str = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("student_projection", student_projection, STUDENT_PROJECTIONS)
        check_choice("teacher_projection", teacher_projection, TEACHER_PROJECTIONS)
        check_choice("metric", metric, METRICS)
        check_choice("method", method, METHODS)
        check_choice("backend", backend, BACKENDS)
        check_count("embedding_width", embedding_width)
        check_seed(seed)
        if bias and "learned" not in (student_projection, teacher_projection):
            raise ValueError("bias is True, but a bias goes with a learned projection and there is none")
        self.pairs = _checked_pairs(pairs)
        self.student_widths = _widths_of("student", student_widths, [i for i, _ in self.pairs])  # one per pair
        self.teacher_widths = _widths_of("teacher", teacher_widths, [j for _, j in self.pairs])
        self.embedding_width = embedding_width
        self.metric = metric
        self.layer_weights = _normalised(layer_weights, len(self.pairs))
        self.student_projection = student_projection
        self.teacher_projection = teacher_projection
        self.shared = shared
        self.resample = resample
        self.seed = seed
        self.method = method
        self.backend = backend

        def side(name: str, kind: str, widths: tuple[int, ...]) -> torch.nn.ModuleList:
            if kind == "none":
                _check_equal(name, widths, embedding_width, f'embedding_width, for {name}_projection is "none"')
                return torch.nn.ModuleList()
            if shared:
                _check_equal(name, widths, widths[0], "one width, for shared is True")
            factory = {"bias": bias} if kind == "learned" else {}
            layer = torch.nn.Linear if kind == "learned" else FrozenProjection
            drawn = widths[:1] if shared else widths
            return torch.nn.ModuleList(layer(d, embedding_width, device=device, dtype=dtype, **factory) for d in drawn)

        self.student_projections = side("student", student_projection, self.student_widths)
        self.teacher_projections = side("teacher", teacher_projection, self.teacher_widths)
        self._draw_frozen()

    def reset_parameters(self) -> None:
        """Draw the learned projections anew, from torch's generator, and the frozen ones again from `seed`."""
        for projection in (*self.student_projections, *self.teacher_projections):
            if isinstance(projection, torch.nn.Linear):
                projection.reset_parameters()
        self._draw_frozen()

    def forward(
        self, student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The weighted mean of the pairs' losses.

        Args:
            student_states: by layer, (..., d_s), such as the `hidden_states` of a transformer.
            teacher_states: by layer, (..., d_t), with the leading dimensions of the student's; with `resample`, the
                last of these may differ.
            mask: (...), in the student's frames: those that count, or weights. What the others hold, NaN included,
                reaches neither the loss nor a gradient. It does not mask the teacher's frames: where those are
                resampled, each student frame that counts needs two sound neighbours.

        Returns:
            A scalar, float32 or, where any argument is float64, float64.

        Raises:
            TypeError: a state or the mask is no tensor.
            ValueError: a layer is missing or a shape does not fit; the message names the state.
        """
        counted = [k for k, weight in enumerate(self.layer_weights) if weight > 0]
        losses = self._losses(student_states, teacher_states, mask, counted)
        return torch.stack([self.layer_weights[k] * loss for k, loss in zip(counted, losses, strict=True)]).sum()

    def pair_losses(
        self, student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """(pairs,): L_k, not weighted, of the arguments of `forward`."""
        return torch.stack(self._losses(student_states, teacher_states, mask, range(len(self.pairs))))

    def extra_repr(self) -> str:
        shown = [f"pairs={self.pairs}", f"embedding_width={self.embedding_width}", f"metric={self.metric!r}"]
        shown += [f"student_projection={self.student_projection!r}", f"teacher_projection={self.teacher_projection!r}"]
        shown += [f"{name}=True" for name in ("shared", "resample") if getattr(self, name)]
        if len(set(self.layer_weights)) > 1:
            shown.append(f"layer_weights=({', '.join(f'{w:.3g}' for w in self.layer_weights)})")
        if self.teacher_projection in ("orthogonal", "johnson_lindenstrauss"):
            shown.append(f"seed={self.seed}")
        shown += [f"{name}={getattr(self, name)!r}" for name in ("method", "backend") if getattr(self, name) != "auto"]
        return ", ".join(shown)

    def _losses(
        self,
        student_states: Sequence[Tensor],
        teacher_states: Sequence[Tensor],
        mask: Tensor | None,
        counted: Iterable[int],
    ) -> list[Tensor]:
        losses = []
        for k in counted:
            i, j = self.pairs[k]
            student = _state("student", student_states, i, self.student_widths[k])  # (..., d_s)
            teacher = _state("teacher", teacher_states, j, self.teacher_widths[k])  # (..., d_t)
            teacher = self._in_student_frames(student, teacher, i, j)
            _check_mask(mask, student, i)
            student_proj, student_bias = self._projection(self.student_projections, k)
            teacher_proj, teacher_bias = self._projection(self.teacher_projections, k)
            loss = projection_alignment_loss(
                student,
                teacher,
                student_proj,
                teacher_proj,
                student_bias=student_bias,
                teacher_bias=teacher_bias,
                metric=self.metric,
                weights=mask,
                method=self.method,
                backend=self.backend,
            )
            losses.append(loss)
        return losses

    def _projection(self, side: torch.nn.ModuleList, k: int) -> tuple[Tensor | None, Tensor | None]:
        """(D, d) and (D,), or None, of pair k."""
        if len(side) == 0:
            return None, None
        projection = cast(torch.nn.Linear, side[0 if self.shared else k])
        return projection.weight, projection.bias

    def _in_student_frames(self, student: Tensor, teacher: Tensor, i: int, j: int) -> Tensor:
        """The teacher's state with the student's leading dimensions, resampled where that was asked for."""
        wanted, shape = student.shape[:-1], teacher.shape[:-1]
        if shape == wanted:
            return teacher
        only_time_differs = len(shape) == len(wanted) > 0 and shape[:-1] == wanted[:-1]
        if self.resample and only_time_differs and shape[-1] > 0:
            return resample_frames(teacher, wanted[-1])
        remedy = "; resample=True brings it to the student's number of frames" if only_time_differs else ""
        raise ValueError(
            f"teacher_states[{j}] has shape {show(teacher.shape)}, but must be (..., d_t) with ... = {show(wanted)}, "
            f"as in student_states[{i}]{'' if self.resample else remedy}"
        )

    @torch.no_grad()
    def _draw_frozen(self) -> None:
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        for projection in self.teacher_projections:
            if isinstance(projection, FrozenProjection):
                D, d_t = projection.weight.shape
                projection.weight.copy_(draw_projection(self.teacher_projection, D, d_t, generator))


def resample_frames(states: Tensor, frames: int) -> Tensor:
    """(..., T, d) -> (..., frames, d), T ≥ 1: linear interpolation along time.

    The numbers of `torch.nn.functional.interpolate(mode="linear", align_corners=False)`, without the transposed
    copy (..., d, T) that it needs. Differentiable.
    """
    T, step = states.shape[-2], 2 * frames
    # Frame f lies at (f + 1/2)·T/frames - 1/2, kept as a fraction of integers: exact for any length.
    frame = torch.arange(frames, device=states.device)
    position = ((2 * frame + 1) * T - frames).clamp(min=0)  # in units of 1/step
    left = position // step
    right = (left + 1).clamp(max=T - 1)
    dtype = torch.promote_types(states.dtype, torch.float32)
    fraction = (position - left * step).to(dtype) / step
    before, after = (states.index_select(-2, index).to(dtype) for index in (left, right))
    return torch.lerp(before, after, fraction[:, None]).to(states.dtype)


def _checked_pairs(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    try:
        checked = tuple(tuple(pair) for pair in pairs)
    except TypeError:
        raise TypeError(f"pairs is {pairs!r}, but must hold (student layer, teacher layer) indices") from None
    if not checked:
        raise ValueError("pairs is empty, but must hold at least one (student layer, teacher layer)")
    for pair in checked:
        if len(pair) != 2 or not all(map(is_whole, pair)):
            raise ValueError(f"pairs holds {pair}, but must hold (student layer, teacher layer) indices")
    return checked  # type: ignore[return-value]


def _widths_of(side: str, widths: Widths, layers: Sequence[int]) -> tuple[int, ...]:
    """The width of each layer in `layers`."""
    found = []
    for layer in layers:
        try:
            width = widths if isinstance(widths, int) else widths[layer]
        except (IndexError, KeyError):
            raise ValueError(f"{side}_widths has no entry for layer {layer}, which pairs names") from None
        except TypeError:
            raise TypeError(f"{side}_widths is {widths!r}, but must be one width, or hold one by layer") from None
        if not is_whole(width):
            raise TypeError(f"{side}_widths gives layer {layer} a width of {width!r}, but it must be a whole number")
        if width < 1:
            raise ValueError(f"{side}_widths gives layer {layer} a width of {width}, but it must be at least 1")
        found.append(width)
    return tuple(found)


def _check_equal(side: str, widths: tuple[int, ...], wanted: int, why: str) -> None:
    for width in widths:
        if width != wanted:
            raise ValueError(f"{side}_widths holds {width}, but must be {wanted}: {why}")


def _normalised(layer_weights: Sequence[float] | None, pairs: int) -> tuple[float, ...]:
    """Sum to 1."""
    weights = [1.0] * pairs if layer_weights is None else [float(w) for w in layer_weights]
    if len(weights) != pairs:
        raise ValueError(f"layer_weights has {len(weights)} entries, but must have one per pair: {pairs}")
    total = sum(weights)
    if not (min(weights) >= 0 and 0 < total < float("inf")):
        raise ValueError(f"layer_weights is {weights}, but must be non-negative, finite and not all 0")
    return tuple(w / total for w in weights)


def _state(side: str, states: Sequence[Tensor], layer: int, width: int) -> Tensor:
    """The state of one layer, checked: (..., width)."""
    name = f"{side}_states"
    if not -len(states) <= layer < len(states):
        raise ValueError(f"{name} has {len(states)} layers, but pairs names layer {layer}")
    state = states[layer]
    check_tensor(f"{name}[{layer}]", state)
    if state.dim() == 0 or state.shape[-1] != width:
        raise ValueError(f"{name}[{layer}] has shape {show(state.shape)}, but must be (..., {width})")
    return state


def _check_mask(mask: Tensor | None, student: Tensor, layer: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is {type(mask).__name__}, but must be a torch.Tensor")
    if mask.shape != student.shape[:-1]:
        raise ValueError(
            f"mask has shape {show(mask.shape)}, but must be {show(student.shape[:-1])}, "
            f"the leading dimensions of student_states[{layer}]"
        )
