"""The error of an implementation against float64, and the budget it is held to.

The budget comes from data: twice the error of eager PyTorch in the same dtype on the same inputs, plus a few units of
rounding of the result's own dtype, so that a lucky eager run does not fail an equally good one. Errors are of whole
tensors, ‖x − exact‖ / ‖exact‖: single elements of two correct runs differ by luck.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

FACTOR = 2
FLOOR = 4  # roundings of the result's dtype


INCOMING = 0.75  # the gradient that arrives from behind: not 1, so that forgetting it shows


def incoming(value: Tensor) -> Tensor:
    """INCOMING for a scalar; a different number for each element, of both signs, otherwise."""
    if value.dim() == 0:
        return torch.full_like(value, INCOMING)
    steps = torch.arange(value.numel(), device=value.device).reshape(value.shape)
    return (INCOMING * torch.cos(steps)).to(value.dtype)


@dataclass(frozen=True)
class Outcome:
    """What one run returned: the loss (or another result) and the gradients that were asked for, by name."""

    loss: Tensor
    grads: dict[str, Tensor]
    name: str = "loss"  # what reports call the first
    others: dict[str, Tensor] = field(default_factory=dict)  # further results

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by the names that reports show."""
        return {self.name: self.loss} | self.others | {f"grad {name}": grad for name, grad in self.grads.items()}


@dataclass(frozen=True)
class Deviation:
    """One tensor's error against float64 beside what it may be."""

    name: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Within budget; an error that is no number is not."""
        return self.error <= self.budget

    @property
    def used(self) -> float:
        """The share of the budget that the error takes."""
        return self.error / self.budget if self.budget else (0.0 if self.error == 0 else float("inf"))


def relative_error(x: Tensor, exact: Tensor) -> float:
    """‖x − exact‖ / ‖exact‖, absolute where exact is 0; infinite when the shape or the place of a NaN differs."""
    if x.shape != exact.shape:
        return float("inf")
    x, exact = as_real(x), as_real(exact)
    finite = exact.isfinite()
    if not torch.equal(x.isfinite(), finite):
        return float("inf")
    x, exact = x[finite], exact[finite]
    norm = exact.norm().item()
    return (x - exact).norm().item() / (norm or 1.0)


def as_real(x: Tensor) -> Tensor:
    """On the CPU in float64; a complex number is two."""
    x = x.detach().cpu()
    return torch.view_as_real(x.resolve_conj()).to(torch.float64) if x.is_complex() else x.to(torch.float64)


def errors(outcome: Outcome, exact: Outcome) -> dict[str, float]:
    """The error of each tensor that `exact` has; infinite for one that is missing."""
    found = outcome.tensors()
    return {
        name: relative_error(found[name], x) if name in found else float("inf") for name, x in exact.tensors().items()
    }


def deviations(outcome: Outcome, exact: Outcome, yardstick: dict[str, float]) -> list[Deviation]:
    """The error of each tensor of `outcome` beside its budget, which `yardstick`, eager's errors, gives.

    Where eager has no finite result, the error must stay below half of what is to be found.
    """
    found = outcome.tensors()
    report = []
    for name, error in errors(outcome, exact).items():
        eps = torch.finfo(found[name].dtype).eps if name in found else 0.0
        allowed = FACTOR * yardstick[name] if isfinite(yardstick[name]) else 0.5
        report.append(Deviation(name, error, allowed + FLOOR * eps))
    return report


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block `torch.empty` and its like return NaN, so that reading what nobody wrote shows.

    `torch.use_deterministic_algorithms` would import torch's compiler, to tell it too: two seconds of every process.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic  # a module with properties, which type checkers do not see
    filled = filling.fill_uninitialized_memory
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = filled
