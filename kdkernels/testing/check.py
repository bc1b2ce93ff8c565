"""What the checks of every operator share: their shape, and where an implementation can be checked."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kdkernels import backend as backends
from kdkernels.testing.compare import Deviation, Outcome, errors

# A float64 run is measured against another: half as much again for the rounding of the oracle, and its floor.
FLOAT64_SHARE = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
FLOAT64_FLOOR = 2 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Check:
    """One implementation on one case; `run` returns the error and budget of each tensor."""

    op: str
    backend: str
    method: str
    device: str
    dtype: torch.dtype
    variant: str  # of the operator, such as a metric
    case: str
    run: Callable[[], list[Deviation]]


def devices(row: backends.Implementation) -> list[str]:
    """Where `row` can be checked here: its own devices, or the CPU through Triton's interpreter."""
    if why_not(row) is not None:
        return []
    here = [d for d in (row.devices or ("cpu", "cuda")) if d != "cuda" or torch.cuda.is_available()]
    return here or ["cpu"]


def why_not(row: backends.Implementation) -> str | None:
    """None when `row` can be checked on this machine, else the reason."""
    reason = row.why_not()
    if reason is not None or row.devices != ("cuda",) or torch.cuda.is_available():
        return reason
    if row.backend != "triton":
        return "there is no CUDA device"
    return None if interpreting() else "there is no CUDA device; TRITON_INTERPRET=1 checks it in Triton's interpreter"


def interpreting() -> bool:
    """Triton reads this when its kernels are defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def held_to_eager(
    inputs: Any, exact: Callable[[Any], Outcome], eager: Callable[[Any], Outcome]
) -> tuple[Outcome, dict[str, float]]:
    """The float64 answer and eager's errors; for float64 those of float32, scaled by the roundings' ratio.

    `inputs` have an `input`, and move to another precision by `to`.
    """
    target = exact(inputs)
    if inputs.input.real.dtype is not torch.float64:
        return target, errors(eager(inputs), target)
    narrow = inputs.to(torch.float32)
    found = errors(eager(narrow), exact(narrow))
    return target, {name: error * FLOAT64_SHARE + FLOAT64_FLOOR for name, error in found.items()}
