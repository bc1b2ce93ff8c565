"""The singular value decomposition in plain PyTorch: on any device, differentiable twice.

    A = U diag(S) Vᴴ,    UᴴU = VᴴV = I,    S_1 ≥ S_2 ≥ … ≥ 0

`torch.linalg` ends with an error, or swallows it (pytorch #187759), when one matrix of a batch is not finite. Here that
matrix becomes NaN and the others are right.
"""

import torch
from torch import Tensor


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., rows, cols) -> U (..., rows, k), S (..., k), Vh (..., k, cols), k = min(rows, cols)."""
    finite, poison = isolate(matrix)
    U, S, Vh = torch.linalg.svd(finite, full_matrices=False)
    return U + poison, S + poison.real.squeeze(-1), Vh + poison


def svdvals(matrix: Tensor) -> Tensor:
    """(..., rows, cols) -> S (..., k)."""
    finite, poison = isolate(matrix)
    return torch.linalg.svdvals(finite) + poison.real.squeeze(-1)


def isolate(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices with those that are not finite replaced by 0, and (..., 1, 1): NaN for those, 0 for the others.

    The second depends on the matrix, so that gradients of what is not finite are NaN too.
    """
    good = matrix.detach().isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    weight = torch.where(good, 0.0, torch.nan).to(matrix.real.dtype)
    return torch.where(good, matrix, 0), (torch.where(good, 0, matrix) * weight).sum((-2, -1), keepdim=True)
