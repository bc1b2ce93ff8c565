"""Seeded matrices, some of them hard, and the ways to decompose them."""

from collections.abc import Callable

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.testing.compare import Outcome, incoming


def make_matrices(
    N: int = 5,
    rows: int = 9,
    cols: int = 7,
    *,
    kind: str = "normal",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Tensor:
    """(N, rows, cols). `graded` columns fall by 30 decades and `ascending` ones grow by 8.

    `repeated` values are 2 and 1, `low rank` is a third. `nearly orthogonal` columns, each half as long as the one
    before, take one sweep, which leaves a little to correct.
    """
    draw = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=wide)

    x, k = normal(N, rows, cols), min(rows, cols)
    if kind == "graded":
        x = x * torch.logspace(0, -30, cols, dtype=torch.float64)
    elif kind == "ascending":
        x = x * torch.logspace(-8, 0, cols, dtype=torch.float64)
    elif kind == "repeated" and k:
        U, _, Vh = torch.linalg.svd(x, full_matrices=False)
        values = 2.0 - (torch.arange(k) >= k // 2).to(torch.float64)
        x = (U * values) @ Vh
    elif kind == "nearly orthogonal":
        U, _, Vh = torch.linalg.svd(x, full_matrices=False)
        x = (U @ Vh + 5e-4 * normal(N, rows, cols)) * 2.0 ** -torch.arange(cols)
    elif kind == "low rank":
        r = max(k // 3, 1)
        x = normal(N, rows, r) @ normal(N, r, cols)
    elif kind == "zero":
        x = 0 * x
    return x.to(device, dtype)


Function = Callable[[Tensor], tuple[Tensor, Tensor, Tensor] | Tensor]


def run_values(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Outcome:
    """S, and the gradient of S times `incoming`."""
    leaf = matrix.detach().requires_grad_()
    S = function(leaf)
    weights = incoming(S).abs().sum(-1, keepdim=True).expand(S.shape)  # symmetric: repeated values have a gradient
    (grad,) = torch.autograd.grad(S, leaf, weights)
    return Outcome(S.detach(), {"A": grad}, "S")


def run_vectors(matrix: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Outcome:
    """S and what does not depend on signs: U diag(S) Vh, UᴴU, V Vᴴ, of square U and V."""
    U, S, Vh = function(matrix)
    k = S.shape[-1]
    others = {"U diag(S) Vh": (U[..., :k] * S.unsqueeze(-2)) @ Vh[..., :k, :], "UᴴU": U.mH @ U, "VhV": Vh @ Vh.mH}
    return Outcome(S, {}, "S", others)


def ours(op: str, matrix: Tensor, backend: str) -> Outcome:
    """The operator."""
    if op == "svdvals":
        return run_values(matrix, lambda x: kd.svdvals(x, backend=backend))
    return run_vectors(matrix, lambda x: kd.svd(x, backend=backend))


def exact(op: str, matrix: Tensor) -> Outcome:
    """torch.linalg in float64, which is the same as the operator's definition."""
    return plain(op, matrix.to(torch.complex128 if matrix.is_complex() else torch.float64))


def plain(op: str, matrix: Tensor) -> Outcome:
    """torch.linalg."""
    if op == "svdvals":
        return run_values(matrix, torch.linalg.svdvals)
    return run_vectors(matrix, torch.linalg.svd)
