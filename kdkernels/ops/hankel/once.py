"""Results that have a first derivative and no second, or none at all, and say so when asked for more.

Their formulas hold singular vectors fixed: a second derivative through them would be wrong without a word.
"""

from typing import Any

import torch
from torch import Tensor


def once(x: Tensor, message: str) -> Tensor:
    """x, whose gradient cannot be differentiated: RuntimeError(message)."""
    return _Once.apply(x, message) if x.requires_grad else x


def never(x: Tensor, source: Tensor, message: str) -> Tensor:
    """x, made of `source`, with no gradient: RuntimeError(message)."""
    return _Never.apply(x, source, message) if torch.is_grad_enabled() and source.requires_grad else x


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, message: str) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[1]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return never(grads[0], ctx.saved_tensors[0], ctx.message), None


class _Never(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, source: Tensor, message: str) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.message)
