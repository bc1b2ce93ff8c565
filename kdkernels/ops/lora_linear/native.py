"""Linear layers with adapters in C++ on the CPU: turns tensors into views, and decides who multiplies the base.

The kernels are in csrc/cpu/lora_linear.cpp, their formulas in csrc/include/kdkernels/lora_linear.h.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _native

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
    base_done = _vendor_multiplies(input.dtype)
    if base_done:
        for y, weight, bias in zip(outputs, weights, biases, strict=True):
            y.copy_(F.linear(input, weight, bias))
    _native.module().lora_linear_forward(
        *_common(input, weights, biases, lora_A, lora_B, projected, scalings, dropout_p, states),
        base_done,
        [_view(y) for y in outputs],
        torch.get_num_threads(),
    )


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
    base_done = _vendor_multiplies(input.dtype)
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


@cache
def _vendor_multiplies(dtype: torch.dtype) -> bool:
    """Whether base products are torch's: where the processor multiplies bfloat16, which our own product does not use.

    In float32 ours is the faster one, as the adapter's part then costs no pass over the output (benchmarks/README.md).
    """
    return dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
