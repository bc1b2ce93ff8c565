"""Linear recurrent units (Orvieto et al. 2023, arXiv 2303.06349), and a residual classifier of sequences from them."""

from collections.abc import Sequence
from math import pi, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from kdkernels.backend import BACKENDS, choose
from kdkernels.contract import (
    autocast_dtype,
    check_choice,
    check_count,
    check_number,
    check_tensor,
    show,
    without_autocast,
)
from kdkernels.ops.linear_recurrence.block import MOST, mix, norm
from kdkernels.ops.linear_recurrence.state_space import state_space

SMALLEST = 1e-8  # of |λ| and of angles, whose logarithms are parameters
PRECISIONS = (torch.float32, torch.float64)  # whose complex numbers torch computes with


class LRU(nn.Module):
    """A diagonal state-space layer: h_t = Λ h_{t−1} + γ ⊙ (B u_t), y_t = Re(C h_t) + D ⊙ u_t.

    λ = exp(−exp(ν_log) + i exp(θ_log)) is stable whatever its parameters are (but for rounding: in float32 |λ| is 1
    where ν_log is below −17). At first the λ are uniform on the ring from `min_radius` to `max_radius`, with phases
    uniform below `max_phase`, and γ = √(1 − |λ|²) makes all states equally large; B, C and D are normal. All parameters
    are real: what is complex has two (`B_re`, `B_im`).

    Args:
        features: H, the inputs and the outputs of each step.
        states: n; they may become fewer by `kdkernels.nn.truncate`.
        min_radius, max_radius: of the ring, 0 ≤ min_radius < max_radius ≤ 1.
        max_phase: above 0, at most 2π.
        backend: as in `kdkernels.linear_recurrence`.
        dtype: of the parameters, float32 or float64.

    Raises:
        TypeError, ValueError: an option does not fit; the message names it.
    """

    def __init__(
        self,
        features: int,
        states: int,
        *,
        min_radius: float = 0.0,
        max_radius: float = 1.0,
        max_phase: float = 2 * pi,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("features", features)
        check_count("states", states)
        for name, value in (("min_radius", min_radius), ("max_radius", max_radius), ("max_phase", max_phase)):
            check_number(name, value)
        if not min_radius < max_radius <= 1:
            raise ValueError(
                f"min_radius is {min_radius} and max_radius {max_radius}, but must be 0 ≤ min_radius < max_radius ≤ 1"
            )
        if not 0 < max_phase <= 2 * pi:
            raise ValueError(f"max_phase is {max_phase}, but must be above 0 and at most 2π")
        check_choice("backend", backend, BACKENDS)
        if dtype not in (None, *PRECISIONS):
            raise TypeError(f"dtype is {dtype}, but must be torch.float32 or torch.float64")
        self.features = int(features)
        self.ring = (float(min_radius), float(max_radius), float(max_phase))
        self.backend = backend
        H, n, options = self.features, int(states), {"device": device, "dtype": dtype}
        self.nu_log = nn.Parameter(torch.empty(n, **options))
        self.theta_log = nn.Parameter(torch.empty(n, **options))
        self.gamma_log = nn.Parameter(torch.empty(n, **options))
        self.B_re = nn.Parameter(torch.empty(n, H, **options))
        self.B_im = nn.Parameter(torch.empty(n, H, **options))
        self.C_re = nn.Parameter(torch.empty(H, n, **options))
        self.C_im = nn.Parameter(torch.empty(H, n, **options))
        self.D = nn.Parameter(torch.empty(H, **options))
        self.reset_parameters()

    @property
    def states(self) -> int:
        """n, as it is now."""
        return self.nu_log.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all of them anew."""
        low, high, phase = self.ring
        n, H = self.B_re.shape
        squared = (torch.rand_like(self.nu_log) * (high**2 - low**2) + low**2).clamp(SMALLEST**2, 1 - 1e-7)
        self.nu_log.copy_((-0.5 * squared.log()).log())
        self.theta_log.copy_((phase * torch.rand_like(self.theta_log)).clamp_min(SMALLEST).log())
        self.gamma_log.copy_(0.5 * torch.log1p(-squared))
        for B in (self.B_re, self.B_im):
            B.normal_(std=(2 * H) ** -0.5)
        for C in (self.C_re, self.C_im):
            C.normal_(std=n**-0.5)
        self.D.normal_()

    def eigenvalues(self) -> Tensor:
        """Λ (n), complex, differentiable."""
        return torch.exp(torch.complex(-self.nu_log.exp(), self.theta_log.exp()))

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Λ (n), γ ⊙ B (n, H) and C (H, n), complex, differentiable: what `kdkernels.hankel_singular_values` takes."""
        B = torch.complex(self.B_re, self.B_im) * self.gamma_log.exp().unsqueeze(-1)
        return self.eigenvalues(), B, torch.complex(self.C_re, self.C_im)

    def forward(self, input: Tensor, initial_state: Tensor | None = None, *, return_state: bool = False) -> Any:
        """The outputs of all steps.

        Computed in the parameters' dtype, whatever autocast says. The states of all steps, (..., T, n), are not in
        memory at once, except on the reference backend and where backward is to be differentiated again.

        Args:
            input: u, (..., T, H).
            initial_state: h_0, (..., n), complex; 0 where it is None.
            return_state: hand on h_T too, from which the next call can go on.

        Returns:
            y (..., T, H), or y and h_T (..., n), which is h_0 where there are no steps.

        Raises:
            TypeError, ValueError: the input is no floating-point tensor of this shape, or the parameters were cast to
                what is neither float32 nor float64.
        """
        H = self.features
        check_tensor("input", input)
        if input.dim() < 2 or input.shape[-1] != H:
            raise ValueError(f"input has shape {show(input.shape)}, but must be (..., T, {H})")
        with without_autocast(input):
            u, y, state = self._recur(input, initial_state)
            y = torch.addcmul(y, self.D, u).reshape(input.shape)
        return (y, state.reshape(*input.shape[:-2], self.states)) if return_state else y

    def _recur(self, input: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """u and Re(C h), (N, T, H), and h_T (N, n), of a checked input (..., T, H)."""
        H, n = self.features, self.states
        leading, dtype = input.shape[:-2], self.D.dtype
        if start is not None and start.shape != (*leading, n):
            raise ValueError(f"initial_state has shape {show(start.shape)}, but must be {show((*leading, n))}")
        if dtype not in PRECISIONS:
            raise TypeError(f"the parameters have dtype {dtype}, but must have torch.float32 or torch.float64")
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.dtype is not dtype:
                raise TypeError(f"{name} has dtype {parameter.dtype}, but D has {dtype}: they must have one")
        u = input.to(dtype).reshape(prod(leading), *input.shape[-2:])
        start = None if start is None else start.to(dtype.to_complex()).reshape(prod(leading), n)
        B = torch.stack([self.B_re, self.B_im], 1) * self.gamma_log.exp().view(n, 1, 1)  # (n, 2, H)
        C = torch.stack([self.C_re, -self.C_im], -1)  # (H, n, 2)
        y, state = state_space(u, self.eigenvalues(), B.view(2 * n, H), C.view(H, 2 * n), start, backend=self.backend)
        return u, y, state

    def extra_repr(self) -> str:
        low, high, phase = self.ring
        shown = f"{self.features}, states={self.states}, radii=({low:g}, {high:g}), max_phase={phase:.3g}"
        return shown if self.backend == "auto" else f"{shown}, backend={self.backend!r}"


class LRUBlock(nn.Module):
    """x + dropout(V z ⊙ sigmoid(G z)) with z = dropout(GELU(LRU(norm(x)))), (..., T, H) -> (..., T, H).

    A feature is dropped in all steps of a sequence at once, as in the published code. The arguments are those of `LRU`,
    and the dropout's probability.
    """

    def __init__(self, features: int, states: int, *, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        factory = {name: options[name] for name in ("device", "dtype") if name in options}
        self.norm = nn.LayerNorm(features, **factory)
        self.lru = LRU(features, states, **options)
        self.value = nn.Linear(features, features, **factory)
        self.gate = nn.Linear(features, features, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        """(..., T, H) -> (..., T, H)."""
        if not self._narrow(input):
            mixed = self._dropped(F.gelu(self.lru(self.norm(input))))
            return input + self._dropped(self.value(mixed) * self.gate(mixed).sigmoid())
        x = input.reshape(prod(input.shape[:-2]), *input.shape[-2:])
        u, y, _ = self.lru._recur(norm(x, self.norm.weight, self.norm.bias, self.norm.eps), None)
        inner, outer = self._mask(x), self._mask(x)
        linear = (self.value.weight, self.value.bias, self.gate.weight, self.gate.bias)
        return mix(x, y, u, self.lru.D, *linear, inner, outer).reshape(input.shape)

    def _narrow(self, input: Tensor) -> bool:
        """Whether the kernels for few features do the same as the modules, of which none is then called."""
        H, parts = self.lru.features, (self.norm, self.lru, self.value, self.gate)
        if not (isinstance(input, Tensor) and input.dim() > 1 and 0 < H <= MOST and input.device.type == "cpu"):
            return False
        if (
            _has_any_global_hook()
            or any(map(_observed, parts))
            or tuple(map(type, parts)) != (nn.LayerNorm, LRU, nn.Linear, nn.Linear)
        ):
            return False
        shaped = ((self.norm, (H,)), (self.value, (H, H)), (self.gate, (H, H)))
        tensors = [x for part, _ in shaped for x in (part.weight, part.bias)]
        return (
            input.shape[-1] == H
            and input.dtype in PRECISIONS
            and all(
                x is not None and (x.dtype, x.device) == (input.dtype, input.device) for x in (*tensors, self.lru.D)
            )
            and all(part.weight.shape == shape for part, shape in shaped)
            and autocast_dtype(input) is None
            and forward_ad._current_level < 0  # LRU says that it has no tangents
            and choose("linear_recurrence", self.lru.backend, "cpu", (input.dtype,)).backend == "native"
        )

    def _dropped(self, x: Tensor) -> Tensor:
        mask = self._mask(x)
        return x if mask is None else x * mask

    def _mask(self, x: Tensor) -> Tensor | None:
        if not (isinstance(self.dropout, nn.Dropout) and self.dropout.training and self.dropout.p):
            return None
        return self.dropout(x.new_ones(*x.shape[:-2], 1, x.shape[-1]))


def _observed(module: nn.Module) -> bool:
    """Whether calling the module may do more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class LRUClassifier(nn.Module):
    """Classes of whole sequences: a linear encoder, residual LRU blocks, the mean over time, a linear head.

    Args:
        inputs: of each step.
        features: H, the width.
        states: n of every block, or one number for each: the sizes that `kdkernels.nn.truncate` left.
        classes: of the head.
        blocks: how many; may be left out where `states` has one for each.
        dropout: its probability.
        options: of `LRU`, and `device` and `dtype`.

    Raises:
        TypeError, ValueError: an option does not fit; the message names it.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        states: int | Sequence[int],
        classes: int,
        *,
        blocks: int | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("inputs", inputs), ("features", features), ("classes", classes)):
            check_count(name, value)
        if blocks is not None:
            check_count("blocks", blocks)
        if isinstance(states, Sequence):
            if blocks not in (None, len(states)) or not states:
                raise ValueError(f"states has {len(states)} numbers, but must have one for each of {blocks} blocks")
            sizes = list(states)
        else:
            sizes = [states] * (blocks or 1)
        factory = {name: options[name] for name in ("device", "dtype") if name in options}
        self.encoder = nn.Linear(inputs, features, **factory)
        self.blocks = nn.ModuleList(LRUBlock(features, n, dropout=dropout, **options) for n in sizes)
        self.head = nn.Linear(features, classes, **factory)

    @property
    def states(self) -> list[int]:
        """n of each block, as it is now."""
        return [block.lru.states for block in self.blocks]  # type: ignore[union-attr,misc]

    def forward(self, input: Tensor) -> Tensor:
        """(..., T, inputs) -> logits (..., classes)."""
        x = self.encoder(input)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(-2))
