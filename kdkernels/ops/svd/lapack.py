"""`torch.linalg`'s decompositions, parallel over the batch: for matrices too large for a SIMD lane each.

LAPACK keeps a second core half busy within one matrix, and all of it with two matrices.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


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
    """`function` of each of the batch's matrices, stacked; of a batch on a GPU at once."""
    if min(torch.get_num_threads(), len(batch)) < 2 or batch.is_cuda:
        with torch.no_grad():
            return tuple(x.contiguous() for x in function(batch))
    results = thread_each(function, batch.detach())
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def thread_each(function: Callable[[Any], Any], items: Any) -> list[Any]:
    """`function` of each of the items, without gradients; torch's threads take one each, and LAPACK one thread.

    The threads end with the call: a pool that outlived it would be dead in a forked process.
    """
    before = torch.get_num_threads()

    def step(item: Any) -> Any:
        with torch.no_grad():  # which is each thread's own
            return function(item)

    try:
        with ThreadPoolExecutor(max(before, 1), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(step, items))
    finally:
        torch.set_num_threads(before)  # new threads would inherit the workers' single one
