"""The benchmark cases of small decompositions, beside `torch.linalg`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backend import Cost, Explanation, explain
from kdkernels.testing.compare import Deviation, Outcome, deviations, errors
from kdkernels.testing.svd.inputs import make_matrices


@dataclass(frozen=True)
class Workload:
    """One case; `open` draws its matrices."""

    name: str
    op: str
    arguments: dict[str, Any]

    def open(self, device: str = "cpu") -> "Session":
        """The case, ready to run."""
        return Session(self.op, make_matrices(**{"device": device} | self.arguments))


@dataclass
class Session:
    """A case's matrices; forward only."""

    op: str
    matrix: Tensor
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.matrix.real.dtype

    def refresh(self) -> None:
        """Nothing changes between two steps."""

    def variants(self) -> dict[str, Callable[[], Outcome]]:
        """torch.linalg, by its own choice and on a GPU by each of its routines, and ours."""
        drivers = {driver: driver for driver in DRIVERS} if self.matrix.is_cuda else {}
        found = {name: partial(self.theirs, driver) for name, driver in {"eager": None, **drivers}.items()}
        return found | {"kdkernels": self.ours}

    def theirs(self, driver: str | None) -> Outcome:
        """By torch.linalg."""
        if self.op == "svdvals":
            return Outcome(torch.linalg.svdvals(self.matrix, driver=driver), {}, "S")
        return outcome(torch.linalg.svd(self.matrix, full_matrices=False, driver=driver))

    def ours(self) -> Outcome:
        """By the operator."""
        if self.op == "svdvals":
            return Outcome(kd.svdvals(self.matrix), {}, "S")
        return outcome(kd.svd(self.matrix, full_matrices=False))

    def judge(self, outcomes: dict[str, Outcome]) -> dict[str, list[Deviation]]:
        """Singular values, and the matrix they came from, against float64."""
        wide = self.matrix.to(torch.complex128 if self.matrix.is_complex() else torch.float64)
        target = Outcome(torch.linalg.svdvals(wide), {}, "S", {"U diag(S) Vh": wide} if self.op == "svd" else {})
        found = {name: rebuilt(x) for name, x in outcomes.items()}
        yardstick = errors(found["eager"], target)
        return {name: deviations(x, target, yardstick) for name, x in found.items()}

    def cost(self, variant: str) -> Cost:
        """The FLOPs and bytes of what the variant runs."""
        method = self.explain().method if variant == "kdkernels" else "lapack"
        return next(cost for cost in self.explain().costs if cost.method == method)

    def explain(self) -> Explanation:
        """What the operator runs here."""
        return explain(self.op, self.matrix, **({} if self.op == "svdvals" else {"full_matrices": False}))


def outcome(result: Any) -> Outcome:
    """U, S and Vh."""
    U, S, Vh = result
    return Outcome(S, {}, "S", {"U": U, "Vh": Vh})


def rebuilt(x: Outcome) -> Outcome:
    """Without the vectors' free signs."""
    if not x.others:
        return x
    return Outcome(x.loss, {}, "S", {"U diag(S) Vh": (x.others["U"] * x.loss.unsqueeze(-2)) @ x.others["Vh"]})


SIZES = ((16, 4096), (32, 2048), (64, 512), (128, 64))  # n, N
SIZES_ON_A_GPU = (*SIZES, (16, 36864), (64, 4096))
DRIVERS = ("gesvd", "gesvdj", "gesvda")  # cuSOLVER's


def workloads(quick: bool = False, device: str = "cpu") -> list[Workload]:
    """The cases; `quick` shrinks the batches."""
    cases = []
    for op, dtype in (("svdvals", torch.float32), ("svdvals", torch.complex64), ("svd", torch.float32)):
        for n, N in SIZES if device == "cpu" else SIZES_ON_A_GPU:
            N = max(N // 64, 2) if quick else N
            name = f"{op}, {N} of {n} × {n}, {str(dtype).removeprefix('torch.')}"
            cases.append(Workload(name, op, {"N": N, "rows": n, "cols": n, "dtype": dtype}))
    return cases
