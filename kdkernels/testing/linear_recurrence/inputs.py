"""Seeded recurrences, and the ways to run them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops.linear_recurrence import reference, schema
from kdkernels.testing.compare import Outcome, incoming

NAMES = ("Lambda", "input", "initial_state")


@dataclass(frozen=True)
class Inputs:
    """One call, as the operator's schema takes it."""

    Lambda: Tensor  # (1 or N, n)
    input: Tensor  # (N, T, n)
    initial_state: Tensor | None  # (N, n)
    reverse: bool
    needs: frozenset[str]  # of NAMES

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another precision: `dtype` is real, and what is complex stays so."""
        kind = dtype.to_complex() if self.input.is_complex() else dtype
        Lambda, input, initial = (None if x is None else x.detach().to(kind) for x in self.tensors())
        assert Lambda is not None and input is not None
        return Inputs(Lambda, input, initial, self.reverse, self.needs)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """As NAMES says."""
        return self.Lambda, self.input, self.initial_state


def make_inputs(
    N: int = 3,
    T: int = 37,
    n: int = 21,
    *,
    radii: tuple[float, float] = (0.5, 0.999),
    own: bool = False,
    initial: bool = False,
    reverse: bool = False,
    strided: bool = False,
    needs: Sequence[str] = NAMES,
    dtype: torch.dtype = torch.complex64,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """|λ| between the radii, phases and signs any. `own`: each sequence its own λ; `strided`: states are rows."""
    draw = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=wide)

    direction = normal(N if own else 1, n)
    low, high = radii
    size = low + (high - low) * torch.rand(direction.shape, generator=draw, dtype=torch.float64)
    Lambda = direction / direction.abs() * size
    input = normal(N, n, T).mT if strided else normal(N, T, n)
    start = normal(N, n) if initial else None
    wanted = frozenset(needs) - (frozenset() if initial else {"initial_state"})
    Lambda, input = Lambda.to(device, dtype), input.to(device, dtype)
    return Inputs(Lambda, input, None if start is None else start.to(device, dtype), reverse, wanted)


Function = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


class Step:
    """Forward and backward on one set of leaves; what arrives from behind is made beforehand."""

    def __init__(self, inputs: Inputs) -> None:
        self.reverse = inputs.reverse
        self.leaves: list[Any] = [
            None if x is None else x.detach().requires_grad_(name in inputs.needs)
            for name, x in zip(NAMES, inputs.tensors(), strict=True)
        ]
        self.wanted = {name: x for name, x in zip(NAMES, self.leaves, strict=True) if name in inputs.needs}
        self.incoming = arriving(inputs.input)

    def __call__(self, function: Function) -> Outcome:
        """The states, and the wanted gradients of them times what arrives."""
        Lambda, input, initial_state = self.leaves
        states = function(Lambda, input, initial_state, self.reverse)
        grads: dict[str, Tensor] = {}
        if self.wanted:
            found = torch.autograd.grad(states, list(self.wanted.values()), self.incoming, allow_unused=True)
            pairs = zip(self.wanted.items(), found, strict=True)
            grads = {name: torch.zeros_like(x) if grad is None else grad for (name, x), grad in pairs}
        return Outcome(states.detach(), grads, "h")


def arriving(x: Tensor) -> Tensor:
    """Of both signs, in the imaginary part too."""
    if not x.is_complex():
        return incoming(x)
    return torch.complex(incoming(x.real), incoming(x.real.flatten().flip(0).reshape(x.shape)))


def exact(inputs: Inputs) -> Outcome:
    """The reference in float64."""
    return eager(inputs.to(torch.float64))


def eager(inputs: Inputs) -> Outcome:
    """The loop over time in the inputs' dtype."""
    return Step(inputs)(through_reference)


def ours(inputs: Inputs, backend: str) -> Outcome:
    """The operator below dispatch, which does not know Triton's interpreter."""
    if backend == "reference":
        return eager(inputs)
    return Step(inputs)(lambda *leaves: schema.linear_recurrence(*leaves, backend))


def through_reference(Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """With the operator's schema."""
    return reference.linear_recurrence(Lambda, input, initial_state, reverse)
