"""The benchmark cases of Hankel singular values, beside three ways to get them from PyTorch.

`eager` is the accurate one of the three.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backend import Cost, Explanation, explain
from kdkernels.testing.compare import Deviation, Outcome, relative_error
from kdkernels.testing.hankel.inputs import SSM, make_systems
from kdkernels.testing.hankel.routes import by_cholesky, by_eigh, eig, gramians

LOOSE = 1e-2  # of contenders: large enough that they are timed where their large values are right
TIGHT = 1e-4  # of ours, in norm

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """One case; `open` draws its systems."""

    name: str
    op: str
    arguments: dict[str, Any]
    grad: bool = False

    def open(self, device: str = "cpu") -> "Session":
        """The case, ready to run."""
        defaults: dict[str, Any] = {"device": device, "dtype": torch.complex64}
        return Session(self.op, make_systems(**defaults | self.arguments), self.grad)


@dataclass
class Session:
    """A case's systems: forward only, or a regulariser's step, the sum with its gradients."""

    op: str
    system: SSM
    grad: bool
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.system.B.real.dtype

    def refresh(self) -> None:
        """Nothing changes between two steps."""

    def functions(self) -> dict[str, Function]:
        """The contenders and ours."""
        if self.op == "gramian_factors":
            return {"eager": factors_by_cholesky, "kdkernels": our_factors}
        if self.op == "hankel_energy":
            return {"eager": lambda *x: eig(*x).square().sum(-1), "kdkernels": kd.hankel_energy}
        if self.grad:  # the gradient of eigh square roots is not finite where a Gramian is near singular
            return {"eager": eig, "kdkernels": kd.hankel_singular_values}
        return {"eager": by_eigh, "Cholesky": by_cholesky, "eig(PQ)": eig, "kdkernels": kd.hankel_singular_values}

    def variants(self) -> dict[str, Callable[[], Outcome]]:
        """One step of each."""
        return {name: lambda function=function: self.step(function) for name, function in self.functions().items()}  # type: ignore[misc]

    def step(self, function: Function) -> Outcome:
        """The values, with the gradients of their sum where those are wanted."""
        if not self.grad:
            return Outcome(function(*self.system), {}, "value")
        leaves = self.system.leaves()
        total = function(*leaves).sum()
        grads = torch.autograd.grad(total, leaves)
        return Outcome(total.detach(), dict(zip(SSM._fields, grads, strict=True)), "value")

    def judge(self, outcomes: dict[str, Outcome]) -> dict[str, list[Deviation]]:
        """In norm, against the reference in float64."""
        wide = Session(self.op, self.system.to(torch.complex128), self.grad)
        with kd.use_backend("reference"):
            target = wide.step(wide.functions()["kdkernels"]).tensors()
        found = {}
        for name, outcome in outcomes.items():
            budget = TIGHT if name == "kdkernels" else LOOSE
            tensors = outcome.tensors()
            if name == "eig(PQ)":
                tensors = {"value": tensors["value"].sort(-1, descending=True)[0]}
            found[name] = [Deviation(k, relative_error(tensors[k], x), budget) for k, x in target.items()]
        return found

    def cost(self, variant: str) -> Cost:
        """The FLOPs and bytes of the method that comes nearest to what the variant runs."""
        explanation = self.explain()
        wanted = explanation.method if variant == "kdkernels" else explanation.costs[-1].method
        return next(cost for cost in explanation.costs if cost.method == wanted)

    def explain(self) -> Explanation:
        """What the operator runs here."""
        return explain(self.op, *self.system)


def factors_by_cholesky(Lambda: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The trace of each factor's square, by which both ways are compared."""
    factors = (torch.linalg.cholesky_ex(gramian)[0] for gramian in gramians(Lambda, B, C))
    return torch.stack([L.abs().square().sum((-2, -1)) for L in factors], -1)


def our_factors(Lambda: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same of ours."""
    return torch.stack([L.abs().square().sum((-2, -1)) for L in kd.gramian_factors(Lambda, B, C)[:2]], -1)


ORDERS = ((16, 1, 4096), (16, 2, 4096), (32, 1, 2048), (64, 1, 512), (16, 1, 36864))  # n, m, N
ORDERS_ON_A_GPU = (*ORDERS, (16, 2, 36864), (32, 1, 36864), (100, 4, 64))


def workloads(quick: bool = False, device: str = "cpu") -> list[Workload]:
    """The cases; `quick` shrinks the batches and the largest order."""
    cases = []
    for n, m, N in ORDERS if device == "cpu" else ORDERS_ON_A_GPU:
        N = max(N // 64, 2) if quick else N
        cases.append(Workload(f"σ of {N} systems, n={n}, m={m}", "hankel_singular_values", {"N": N, "n": n, "m": m}))
    n, N = (24, 2) if quick else (256, 6)
    large = {"N": N, "n": n, "m": 8}
    cases.append(Workload(f"Σσ and its gradient, {N} systems, n={n}, m=8", "hankel_singular_values", large, True))
    cases.append(Workload(f"Σσ² and its gradient, {N} systems, n={n}, m=8", "hankel_energy", large, True))
    N = 64 if quick else 4096
    small = {"N": N, "n": 16, "m": 2, "dtype": torch.complex64}
    cases.append(Workload(f"Gramian factors of {N} systems, n=16, m=2", "gramian_factors", small))
    return list({case.name: case for case in cases}.values())
