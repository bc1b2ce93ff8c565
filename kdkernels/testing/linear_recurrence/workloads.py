"""The benchmark cases of the recurrence: forward and backward, beside the loop over time and what avoids it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdkernels import explain, linear_recurrence
from kdkernels.backend import Cost, Explanation
from kdkernels.testing.compare import Deviation, Outcome, deviations, errors
from kdkernels.testing.linear_recurrence.inputs import Function, Inputs, Step, exact, make_inputs, through_reference

OP = "linear_recurrence"
OURS = ("eager", "kdkernels")
PEERS_ERROR = 5e-4


@dataclass(frozen=True)
class Workload:
    """One case; `open` draws its tensors."""

    name: str
    arguments: dict[str, Any]
    op: str = OP

    def open(self, device: str = "cpu") -> "Session":
        """The case, ready to run."""
        return Session(make_inputs(**{"device": device} | self.arguments))


@dataclass
class Session:
    """A case's tensors; every variant steps from the same ones."""

    inputs: Inputs
    dtype: torch.dtype = field(init=False)
    step: Step = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.inputs.input.real.dtype
        self.step = Step(self.inputs)

    def refresh(self) -> None:
        """Nothing changes between two steps."""

    def variants(self) -> dict[str, Callable[[], Outcome]]:
        """One forward and backward of each contender."""
        torch.compiler.reset()
        compiled = torch.compile(some_steps, fullgraph=True, dynamic=False)

        def by_steps(Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
            real, states = torch.view_as_real, []
            state, factor = real(torch.zeros_like(input[:, 0])), real(Lambda.squeeze(0))
            for part in real(input).split(STEPS, 1):
                states.append(compiled(factor, part, state))
                state = states[-1][:, -1]
            return torch.view_as_complex(torch.cat(states, 1))

        functions: dict[str, Function] = {
            "eager": through_reference,
            "torch.compile": by_steps,
            "FFT": by_convolution,
            "kdkernels": lambda Lambda, *rest: linear_recurrence(Lambda.squeeze(0), *rest[:2], reverse=rest[2]),
        }
        return {name: lambda function=function: self.step(function) for name, function in functions.items()}  # type: ignore[misc]

    def judge(self, outcomes: dict[str, Outcome]) -> dict[str, list[Deviation]]:
        """Errors against float64: ours beside twice eager's, the peers' beside what a trainer would put up with.

        FFT loses two digits of λ's gradient, where the largest powers of all sequences meet.
        """
        target = exact(self.inputs)
        eager = errors(outcomes["eager"], target)
        wide = {name: max(error, PEERS_ERROR) for name, error in eager.items()}
        return {name: deviations(x, target, eager if name in OURS else wide) for name, x in outcomes.items()}

    def cost(self, variant: str) -> Cost:
        """Forward reads the input and writes the states; backward reads both and what arrives, and writes one."""
        (one,) = self.explain().costs
        return Cost(variant, 3 * one.flops, one.bytes + one.bytes * 3 // 2)

    def explain(self) -> Explanation:
        """What the operator runs here."""
        return explain(OP, self.inputs.Lambda.squeeze(0), self.inputs.input)


STEPS = 16


def some_steps(Lambda: Tensor, input: Tensor, state: Tensor) -> Tensor:
    """The loop over a few steps, which torch.compile makes one kernel of; to compile all of them takes too long.

    A complex number is two, (..., 2), for inductor leaves complex numbers to eager.
    """
    (a, b), (x, y), states = Lambda.unbind(-1), state.unbind(-1), []
    for u, v in (part.unbind(-1) for part in input.unbind(1)):
        x, y = a * x - b * y + u, a * y + b * x + v
        states.append(torch.stack([x, y], -1))
    return torch.stack(states, 1)


def by_convolution(Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """h = (1, λ, λ², …) ∗ u by FFT."""
    T = input.shape[1]
    powers = Lambda.squeeze(0) ** torch.arange(T, device=input.device).unsqueeze(-1)  # (T, n)
    product = torch.fft.fft(powers, n=2 * T, dim=0) * torch.fft.fft(input, n=2 * T, dim=1)
    return torch.fft.ifft(product, dim=1)[:, :T]


SIZES = ((32, 1024, 256), (8, 784, 256), (4, 16384, 64))  # N, T, n
SIZES_ON_A_GPU = (*SIZES, (32, 16384, 384), (50, 1024, 384))


def workloads(quick: bool = False, device: str = "cpu") -> list[Workload]:
    """The cases; `quick` shrinks every size."""
    cases = []
    for N, T, n in SIZES if device == "cpu" else SIZES_ON_A_GPU:
        if quick:
            N, T, n = max(N // 16, 1), max(T // 64, 8), n // 8
        arguments = {"N": N, "T": T, "n": n, "radii": (0.9, 0.999), "dtype": torch.complex64}
        cases.append(Workload(f"recurrence, N={N}, T={T}, n={n}, complex64", arguments))
    return cases
