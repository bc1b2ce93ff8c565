"""Linear layers with adapters in C++ on the CPU: decides who multiplies the base.

The kernels are in csrc/cpu/lora_linear.cpp, their formulas in csrc/include/kdkernels/lora_linear.h.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _native
from kdkernels.gemm import vendor_multiplies
from kdkernels.ops.lora_linear.call import TENSORS, LoRA, by_layer, unpack

Maybe = Sequence[Tensor | None]


def forward(
    tensors: Maybe, numbers: Sequence[float], states: Tensor | None, projected: Sequence[Tensor], outputs: list[Tensor]
) -> None:
    """Fill each output (N, d_out) and projected (N, r) (see `schema.lora_linear`)."""
    by_vendor = _vendor_multiplies(tensors)
    absent = [None] * len(outputs)
    _native.module().lora_linear_forward(
        tensors, numbers, _words(states), projected, absent if by_vendor else outputs, torch.get_num_threads()
    )
    if by_vendor:
        x = tensors[0]
        assert x is not None
        for y, S, layer in zip(outputs, projected, unpack(tensors, numbers), strict=True):
            if x.dtype is torch.bfloat16:
                y.copy_(_joined(x, S, layer))
            else:
                _product(x, layer, y).addmm_(S, layer.lora_B.T.to(S.dtype), alpha=layer.scaling)


def _vendor_multiplies(tensors: Maybe) -> bool:
    """The first layer decides for its siblings."""
    x, W, *_ = tensors
    assert x is not None and W is not None
    return vendor_multiplies(x.dtype, x.numel() * W.shape[0])


def _product(input: Tensor, layer: LoRA, out: Tensor) -> Tensor:
    """x Wᵀ + b."""
    W = layer.weight.T
    return torch.mm(input, W, out=out) if layer.bias is None else torch.addmm(layer.bias, input, W, out=out)


def _joined(input: Tensor, S: Tensor, layer: LoRA) -> Tensor:
    """x Wᵀ + b + α S Bᵀ in bfloat16 as one product of [x, α S] and [W, B], so that the vendor rounds the sum once.

    α S becomes three columns, each what the ones before it leave: 24 bits. Where B is wider than W,
    it takes two: [S₁, S₂, S₁] and [B₁, B₁, B₂] give the adapter's part to 16 bits, 8 more than the result has.
    """
    dtype, lora_B = layer.weight.dtype, layer.lora_B
    (first, second, third), (B, rest) = _terms(layer.scaling * S, dtype, 3), _terms(lora_B, dtype, 2)
    exact = lora_B.dtype is dtype
    columns = [input, first, second, third if exact else first]
    return F.linear(torch.cat(columns, 1), torch.cat([layer.weight, B, B, B if exact else rest], 1), layer.bias)


def _terms(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """x as a sum of numbers of a narrower dtype; what is not finite stands in the first alone."""
    found = []
    for _ in range(count):
        found.append(x.to(dtype))
        x = torch.where(found[-1].isfinite(), x - found[-1], 0)
    return found


def backward(
    tensors: Maybe,
    numbers: Sequence[float],
    states: Tensor | None,
    projected: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grads: list[Tensor | None],
) -> None:
    """Fill every gradient that has room."""
    input = tensors[0]
    assert input is not None
    base_done = _vendor_multiplies(tensors)
    if base_done:
        layers = zip(grad_outputs, by_layer(tensors), by_layer(grads), strict=True)
        for k, (dY, (weight, *_), (dW, *_)) in enumerate(layers):
            if (dX := grads[0]) is not None:
                torch.addmm(dX, dY, weight, beta=int(k > 0), out=dX)
            if dW is not None:
                torch.mm(dY.T, input, out=dW)
        grads = [None if i % TENSORS == 1 else g for i, g in enumerate(grads)]
    _native.module().lora_linear_backward(
        tensors, numbers, _words(states), projected, grad_outputs, grads, base_done, torch.get_num_threads()
    )


def _words(states: Tensor | None) -> list[list[int]]:
    """Seed and offset of each mask."""
    return [] if states is None else states.tolist()
