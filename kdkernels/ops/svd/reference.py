"""The singular value decomposition in plain PyTorch: on any device, differentiable twice.

    A = U diag(S) Vᴴ,    UᴴU = VᴴV = I,    S_1 ≥ S_2 ≥ … ≥ 0

`torch.linalg` ends with an error, or swallows it (pytorch #187759), when one matrix of a batch is not finite. Here that
matrix becomes NaN and the others are right. Its gradient is not finite at equal singular values (pytorch #49886), ours
is; but only torch's own can be transformed by torch.func, traced, or differentiated forward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdkernels.ops.svd import gradient


def svd(matrix: Tensor, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(..., rows, cols) -> U (..., rows, k), S (..., k), Vh (..., k, cols), k = min(rows, cols)."""
    finite, poison = isolate(matrix)
    function = Decomposition.forward if transformed(finite) else Decomposition.apply
    U, S, Vh = function(finite, driver)
    return U + poison, S + poison.real.squeeze(-1), Vh + poison


def svdvals(matrix: Tensor, driver: str | None = None) -> Tensor:
    """(..., rows, cols) -> S (..., k)."""
    finite, poison = isolate(matrix)
    return torch.linalg.svdvals(finite, driver=driver) + poison.real.squeeze(-1)


class Decomposition(torch.autograd.Function):
    """`torch.linalg.svd`, reduced, with the gradient of `gradient.py`."""

    @staticmethod
    def forward(matrix: Tensor, driver: str | None) -> Any:
        """U, S, Vh."""
        return tuple(torch.linalg.svd(matrix, full_matrices=False, driver=driver))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keeps U, S, Vh."""
        gradient.save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        """The matrix's; a driver has none."""
        return gradient.differentiate(ctx, *grads), None


def transformed(x: Tensor) -> bool:
    """Whether more than autograd's backward is asked of what is done with x."""
    if torch.compiler.is_compiling():
        return False
    active = torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
    return active or forward_ad.unpack_dual(x).tangent is not None


def isolate(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices with those that are not finite replaced by 0, and (..., 1, 1): NaN for those, 0 for the others.

    The second depends on the matrix, so that gradients of what is not finite are NaN too.
    """
    good = matrix.detach().isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    weight = torch.where(good, 0.0, torch.nan).to(matrix.real.dtype)
    return torch.where(good, matrix, 0), (torch.where(good, 0, matrix) * weight).sum((-2, -1), keepdim=True)
