"""Checks and benchmark cases of the operators that return models: truncated ones, and those realised from data.

A model's basis is free, so models are compared by their Markov parameters h_k = C A^{k−1} B or by their response.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import backend as backends
from kdkernels.backend import Cost, Explanation, explain
from kdkernels.ops.hankel.kernel import wide
from kdkernels.ops.hankel.realization import BlockHankel, Realization
from kdkernels.testing.check import Check, devices
from kdkernels.testing.compare import Deviation, Outcome, relative_error
from kdkernels.testing.hankel.inputs import frequency_response, make_systems
from kdkernels.testing.hankel.routes import gramians, root

# of contenders, in norm: float32 data of T numbers does not tell σ below T times its rounding from noise
BUDGET = 1e-3
OPS = ("balanced_truncation", "hankel_svd", "era")

TRUNCATIONS: dict[str, dict[str, Any]] = {
    family: {"family": family, "N": 2} for family in ("LRU", "mamba", "near circle", "clustered")
}
SEQUENCES: dict[str, dict[str, Any]] = {
    "formed": {"T": 41, "m": 2},
    "one by one": {"T": 30, "m": 1},
    "by FFT": {"T": 801, "m": 1},
}


def markov_of(A: Tensor, B: Tensor, C: Tensor, T: int) -> Tensor:
    """h_1 … h_T of A (..., n, n): (..., T, p, m)."""
    found, state = [], B
    for _ in range(T):
        found.append(C @ state)
        state = A @ state
    return torch.stack(found, -3)


def make_markov(T: int, m: int, dtype: torch.dtype, device: str, N: int = 2, n: int = 6) -> Tensor:
    """(N, T, m, m) of seeded systems of order n."""
    family = "LRU" if dtype.is_complex else "real"
    system = make_systems(family, N, n, m, device=device)
    powers = system.Lambda.unsqueeze(1) ** torch.arange(T, device=device)[:, None]
    return torch.einsum("zpi,zti,zim->ztpm", system.C, powers, system.B).to(dtype)


# ---- what `validate` runs


def checks() -> Iterator[Check]:
    """All that can run on this machine."""
    for row in backends.TABLE:
        if row.op not in OPS:
            continue
        cases = TRUNCATIONS if row.op == "balanced_truncation" else SEQUENCES
        for device in devices(row):
            for dtype in row.dtypes:
                for name, arguments in cases.items():
                    if "family" in arguments and not dtype.is_complex and name != "mamba":
                        continue
                    run = partial(COMPARE[row.op], dict(arguments) | {"dtype": dtype, "device": device}, row.backend)
                    method = "fft" if name == "by FFT" else row.methods[0]
                    yield Check(row.op, row.backend, method, device, dtype, "batch", name, run)


def compare_truncation(arguments: dict[str, Any], backend: str) -> list[Deviation]:
    """The values, the response against its certificate, and stability."""
    system = make_systems(**arguments)
    small = kd.balanced_truncation(*system, tolerance=1e-2, backend=backend)
    exact = kd.hankel_singular_values(*map(wide, system), backend="reference")
    z = torch.polar(torch.ones(200, dtype=torch.float64), torch.linspace(-torch.pi, torch.pi, 200, dtype=torch.float64))
    used = 0.0
    for k, bound in enumerate(small.error_bound.cpu()):
        full, less = (
            frequency_response(model[0][k].cpu(), model[1][k].cpu(), model[2][k].cpu(), z)
            for model in (system, (small.Lambda, small.B, small.C))
        )
        used = max(used, float(torch.linalg.matrix_norm(full - less, 2).max() / bound))
    return [
        Deviation("singular_values", relative_error(small.singular_values, exact), 1e-9),
        Deviation("response / error_bound", used, 1.0),
        Deviation("unstable poles", float((small.Lambda.abs() >= 1).sum()), 0.0),
    ]


def compare_svd(arguments: dict[str, Any], backend: str) -> list[Deviation]:
    """Against the dense matrix in float64."""
    markov, rank = make_markov(**arguments), 4
    H = BlockHankel(wide(markov)).dense()
    U, S, Vh = kd.hankel_svd(markov, rank)
    budget = 100 * torch.finfo(markov.dtype).eps
    rebuilt = wide(U) * S.unsqueeze(-2) @ wide(Vh)
    exact_U, exact_S, exact_Vh = (torch.linalg.svd(H, full_matrices=False)[i] for i in range(3))
    best = (exact_U * exact_S.unsqueeze(-2))[..., :rank] @ exact_Vh[:, :rank]
    return [
        Deviation("S", relative_error(S, exact_S[:, :rank]), budget),
        Deviation("U diag(S) Vh", relative_error(rebuilt, best), budget),
    ]


def compare_era(arguments: dict[str, Any], backend: str) -> list[Deviation]:
    """The data that the model gives back."""
    markov = make_markov(**arguments)
    found = kd.era(markov, 6)
    again = markov_of(wide(found.A), wide(found.B), wide(found.C), markov.shape[1])
    return [Deviation("markov", relative_error(again, markov), 1e4 * torch.finfo(markov.dtype).eps)]


COMPARE: dict[str, Callable[[dict[str, Any], str], list[Deviation]]] = {
    "balanced_truncation": compare_truncation,
    "hankel_svd": compare_svd,
    "era": compare_era,
}


# ---- what `bench` times


@dataclass(frozen=True)
class Workload:
    """One case; `open` draws its data."""

    name: str
    op: str
    arguments: dict[str, Any]
    rank: int

    def open(self, device: str = "cpu") -> "Session":
        """The case, ready to run."""
        if self.op == "balanced_truncation":
            data: tuple[Tensor, ...] = make_systems(device=device, dtype=torch.complex64, **self.arguments)
        else:
            data = (make_markov(device=device, dtype=torch.float32, **self.arguments),)
        return Session(self.op, data, self.rank)


@dataclass
class Session:
    """A case's data."""

    op: str
    data: tuple[Tensor, ...]
    rank: int
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.data[0].real.dtype

    def refresh(self) -> None:
        """Nothing changes between two steps."""

    def variants(self) -> dict[str, Callable[[], Outcome]]:
        """Dense decompositions, and ours."""
        ours: Any = {"balanced_truncation": our_truncation, "hankel_svd": our_svd, "era": kd.era}[self.op]
        dense: Any = {"balanced_truncation": truncate_by_eigh, "hankel_svd": dense_svd, "era": dense_era}[self.op]
        return {"eager": lambda: self.step(dense), "kdkernels": lambda: self.step(ours)}

    def step(self, function: Callable[..., Any]) -> Outcome:
        """A model, or the leading singular values."""
        found = function(*self.data, rank=self.rank)
        if isinstance(found, Tensor):
            return Outcome(found, {}, "S")
        return Outcome(found[0], {}, "A", {"B": found[1], "C": found[2]})

    def judge(self, outcomes: dict[str, Outcome]) -> dict[str, list[Deviation]]:
        """Models by their Markov parameters: against the data, or for truncation the reference's."""
        T = 64
        if self.op == "balanced_truncation":
            exact = markov_of(*our_truncation(*self.data, rank=self.rank, backend="reference"), T)
        elif self.op == "era":
            exact = self.data[0][:, :T]
        else:
            exact = torch.linalg.svdvals(BlockHankel(wide(self.data[0])).dense())[:, : self.rank]
        found = {}
        for name, x in outcomes.items():
            value = x.loss if self.op == "hankel_svd" else markov_of(x.loss, x.others["B"], x.others["C"], T)
            found[name] = [
                Deviation("S" if self.op == "hankel_svd" else "markov", relative_error(value, exact), BUDGET)
            ]
        return found

    def cost(self, variant: str) -> Cost:
        """The FLOPs and bytes of what the variant runs."""
        explanation = self.explain()
        method = explanation.method if variant == "kdkernels" else DENSE[self.op]
        return next(cost for cost in explanation.costs if cost.method == method)

    def explain(self) -> Explanation:
        """What the operator runs here."""
        return explain(self.op, *self.data, rank=self.rank)


DENSE = {"balanced_truncation": "lapack", "hankel_svd": "dense", "era": "dense"}


def our_truncation(*system: Tensor, rank: int, backend: str = "auto") -> Realization:
    """The reduced model with its poles on a diagonal."""
    small = kd.balanced_truncation(*system, rank=rank, backend=backend)
    return Realization(torch.diag_embed(small.Lambda), small.B, small.C)


def truncate_by_eigh(Lambda: Tensor, B: Tensor, C: Tensor, rank: int) -> Realization:
    """Square roots of both Gramians by eigh, in float64; eigenvectors inverted."""
    Lambda, B, C = wide(Lambda), wide(B), wide(C)
    P, Q = (root(gramian) for gramian in gramians(Lambda, B, C))
    U, S, Vh = torch.linalg.svd(Q.mH @ P)
    scale = S[..., :rank].rsqrt().unsqueeze(-2)
    T, W = (P @ Vh.mH[..., :rank]) * scale, (Q @ U[..., :rank]) * scale
    poles, X = torch.linalg.eig(W.mH @ (Lambda.unsqueeze(-1) * T))
    model = (torch.diag_embed(poles), torch.linalg.solve(X, W.mH @ B), C @ T @ X)
    return Realization(*(x.to(torch.complex64) for x in model))


def our_svd(markov: Tensor, rank: int) -> Tensor:
    """S."""
    return kd.hankel_svd(markov, rank).S


def dense_svd(markov: Tensor, rank: int) -> Tensor:
    """S of the matrix itself, its vectors computed and thrown away."""
    return torch.linalg.svd(BlockHankel(markov).dense(), full_matrices=False)[1][:, :rank]


def dense_era(markov: Tensor, rank: int) -> Realization:
    """By the matrix itself."""
    p, m = markov.shape[-2:]
    U, S, Vh = torch.linalg.svd(BlockHankel(markov).dense(), full_matrices=False)
    U, scale, Vh = U[..., :rank], S[:, :rank].sqrt(), Vh[:, :rank]
    A = torch.linalg.lstsq(U[:, :-p], U[:, p:]).solution
    A = A / scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return Realization(A, scale.unsqueeze(-1) * Vh[..., :m], U[:, :p] * scale.unsqueeze(-2))


def workloads(quick: bool = False) -> list[Workload]:
    """The cases; `quick` shrinks them."""
    N, n = (2, 16) if quick else (64, 64)
    T = 127 if quick else 1023
    systems = {"N": N, "n": n, "m": 2}
    sequence = {"T": T, "m": 4, "N": 1, "n": 16}
    return [
        Workload(f"{N} systems, n={n}, m=2, to n={n // 4}", "balanced_truncation", systems, n // 4),
        Workload(f"leading 16 of T={T}, 4 × 4", "hankel_svd", sequence, 16),
        Workload(f"model of order 16 from T={T}, 4 × 4", "era", sequence, 16),
    ]
