"""`torch.linalg`'s decompositions, parallel over the batch: for matrices too large for a SIMD lane each.

LAPACK keeps a second core half busy within one matrix, and all of it with two matrices.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdkernels import threads


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, rows, cols) -> U, S, Vh; a matrix that is not finite gives NaN."""
    finite = matrix.isfinite().all(-1).all(-1)
    U, S, Vh = in_parallel(
        lambda x: torch.linalg.svd(x, full_matrices=False), torch.where(finite[:, None, None], matrix, 0)
    )
    for x in (U, S, Vh):
        x[~finite] = torch.nan
    return U, S, Vh


def svdvals(matrix: Tensor) -> Tensor:
    """(N, rows, cols) -> S; a matrix that is not finite gives NaN."""
    finite = matrix.isfinite().all(-1).all(-1)
    (S,) = in_parallel(lambda x: (torch.linalg.svdvals(x),), torch.where(finite[:, None, None], matrix, 0))
    S[~finite] = torch.nan
    return S


def in_parallel(function: Callable[[Tensor], tuple[Tensor, ...]], batch: Tensor) -> tuple[Tensor, ...]:
    """`function` of each of the batch's matrices, stacked; torch's threads take a matrix each."""
    if min(torch.get_num_threads(), len(batch)) < 2 or batch.is_cuda:
        with torch.no_grad():
            return tuple(x.contiguous() for x in function(batch))
    return tuple(torch.stack(parts) for parts in zip(*threads.each(function, batch.detach()), strict=True))
