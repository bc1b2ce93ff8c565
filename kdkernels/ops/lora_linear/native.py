"""Linear layers with adapters in C++ on the CPU: turns tensors into views, and decides who multiplies the base.

The kernels are in csrc/cpu/lora_linear.cpp, their formulas in csrc/include/kdkernels/lora_linear.h.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _native
from kdkernels.gemm import vendor_multiplies

Tensors = Sequence[Tensor]
Maybe = Sequence[Tensor | None]


def forward(
    input: Tensor,
    weights: Tensors,
    biases: Maybe,
    lora_A: Tensors,
    lora_B: Tensors,
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    outputs: Tensors,
    projected: Tensors,
) -> None:
    """Fill each output (N, d_out) and projected (N, r) (see `schema.lora_linear`)."""
    by_vendor = vendor_multiplies(input.dtype)
    _native.module().lora_linear_forward(
        *_common(input, weights, biases, lora_A, lora_B, projected, scalings, dropout_p, states),
        [None if by_vendor else _view(y) for y in outputs],
        torch.get_num_threads(),
    )
    if by_vendor:
        for y, S, *layer in zip(outputs, projected, weights, biases, lora_B, scalings, strict=True):
            y.copy_(_joined(input, S, *layer))


def _joined(input: Tensor, S: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor, scaling: float) -> Tensor:
    """x Wᵀ + b + α S Bᵀ as one product of [x, α S] and [W, B], so that the vendor rounds the sum once.

    In a narrower dtype α S becomes three columns, each what the ones before it leave: 24 bits. Where B is wider than W,
    it takes two: [S₁, S₂, S₁] and [B₁, B₁, B₂] give the adapter's part to 16 bits, 8 more than the result has.
    """
    dtype = weight.dtype
    S = scaling * S
    if dtype is torch.bfloat16:
        (first, second, third), (B, rest) = _terms(S, dtype, 3), _terms(lora_B, dtype, 2)
        exact = lora_B.dtype is dtype
        S, lora_B = torch.cat([first, second, third if exact else first], 1), torch.cat([B, B, B if exact else rest], 1)
    return F.linear(torch.cat([input, S], 1), torch.cat([weight, lora_B], 1), bias)


def _terms(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """x as a sum of numbers of a narrower dtype; what is not finite stands in the first alone."""
    found = []
    for _ in range(count):
        found.append(x.to(dtype))
        x = torch.where(found[-1].isfinite(), x - found[-1], 0)
    return found


def backward(
    grad_outputs: Tensors,
    input: Tensor,
    projected: Tensors,
    weights: Tensors,
    lora_A: Tensors,
    lora_B: Tensors,
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    grad_input: Tensor | None,
    grad_weights: Maybe,
    grad_biases: Maybe,
    grad_A: Maybe,
    grad_B: Maybe,
) -> None:
    """Fill every gradient that has room."""
    base_done = vendor_multiplies(input.dtype)
    grad_weights = list(grad_weights)
    if base_done:
        if grad_input is not None:
            torch.mm(grad_outputs[0], weights[0], out=grad_input)
            for dY, weight in zip(grad_outputs[1:], weights[1:], strict=True):
                grad_input.addmm_(dY, weight)
        for k, dW in enumerate(grad_weights):
            if dW is not None:
                torch.mm(grad_outputs[k].T, input, out=dW)
                grad_weights[k] = None
    grads = zip(grad_weights, grad_biases, grad_A, grad_B, strict=True)
    _native.module().lora_linear_backward(
        *_common(input, weights, [None] * len(weights), lora_A, lora_B, projected, scalings, dropout_p, states),
        base_done,
        [_view(dY) for dY in grad_outputs],
        _view(grad_input),
        [[_view(g) for g in group] for group in grads],
        torch.get_num_threads(),
    )


def _common(
    input: Tensor,
    weights: Tensors,
    biases: Maybe,
    lora_A: Tensors,
    lora_B: Tensors,
    projected: Tensors,
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
) -> tuple[object, ...]:
    operands = zip(weights, biases, lora_A, lora_B, projected, strict=True)
    words = [(seed % 2**64, offset % 2**64) for seed, offset in states.tolist()] or [(0, 0)] * len(weights)
    layers = [[_view(x) for x in layer] for layer in operands]
    return _view(input), layers, list(scalings), list(dropout_p), words, _native.dtype_name(projected[0].dtype)


_view = _native.view
