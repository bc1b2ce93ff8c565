"""The operators as torch.library sees them: schema, shapes without data, autograd.

Backward is made of torch's own operations on U, S and Vh, so that it can be differentiated again.
"""

from torch import Tensor

from kdkernels.library import operator
from kdkernels.ops.svd import gradient, native


@operator("kdkernels::svd")
def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, rows, cols) -> U (N, rows, k), S (N, k), Vh (N, k, cols)."""
    U, S, Vh = native.svd(matrix, vectors=True)
    assert U is not None and Vh is not None
    return U, S, Vh


@svd.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, rows, cols = matrix.shape
    k = min(rows, cols)
    real = matrix.real.dtype
    return matrix.new_empty(N, rows, k), matrix.new_empty(N, k, dtype=real), matrix.new_empty(N, k, cols)


@operator("kdkernels::svdvals")
def svdvals(matrix: Tensor) -> Tensor:
    """(N, rows, cols) -> S (N, k). Has no gradient: where one is needed, `svd` gives S."""
    return native.svd(matrix, vectors=False)[1]


@svdvals.register_fake
def _(matrix: Tensor) -> Tensor:
    N, rows, cols = matrix.shape
    return matrix.new_empty(N, min(rows, cols), dtype=matrix.real.dtype)


svd.register_autograd(gradient.differentiate, setup_context=gradient.save)
