"""Products and sums over blocks of rows in float32 (float64 of float64), whatever the dtypes of their operands."""

from collections.abc import Callable

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a b, or out += a b; a and b have one dtype."""
    if a.dtype is out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
        return
    product = torch.empty_like(out) if accumulate else out
    if a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=product)
    else:  # only GPUs have matmuls with mixed dtypes
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=product)
    if accumulate:  # not every torch has addmm with a float32 sum of low-precision products
        out += product


class Total:
    """The sum of what blocks add to a gradient, which may be None: the gradient itself where its dtype is `dtype`."""

    def __init__(
        self,
        grad: Tensor | None,
        dtype: torch.dtype = torch.float32,
        multiply: Callable[[Tensor, Tensor, Tensor, bool], None] = multiply,
    ) -> None:
        self.grad, self.filled, self.multiply = grad, False, multiply
        self.sum = grad
        if grad is not None and grad.dtype is not dtype:
            self.sum = torch.empty_like(grad, dtype=dtype)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a b."""
        assert self.sum is not None
        self.multiply(a, b, self.sum, self.filled)
        self.filled = True

    def add_rows(self, x: Tensor) -> None:
        """Add the sum of the rows of x."""
        assert self.sum is not None
        if self.filled:
            self.sum += x.sum(0, dtype=self.sum.dtype)
        else:
            torch.sum(x, 0, dtype=self.sum.dtype, out=self.sum)
        self.filled = True

    def finish(self) -> None:
        """Fill the gradient."""
        if self.grad is not None and not self.filled:
            self.grad.zero_()
        elif self.grad is not None and self.sum is not None and self.sum is not self.grad:
            self.grad.copy_(self.sum)
