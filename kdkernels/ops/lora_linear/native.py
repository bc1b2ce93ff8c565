"""Linear layers with adapters in C++ on the CPU, and who multiplies there.

The kernels are in csrc/cpu/lora_linear.cpp, their formulas in csrc/include/kdkernels/lora_linear.h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import _native
from kdkernels.gemm import vendor_multiplies
from kdkernels.ops.lora_linear import vendor
from kdkernels.ops.lora_linear.call import NUMBERS, TENSORS, unpack

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
        vendor.finish(tensors[0], unpack(tensors, numbers), projected, outputs)  # type: ignore[arg-type]


def backward(
    tensors: Maybe,
    numbers: Sequence[float],
    states: Tensor | None,
    projected: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grads: list[Tensor | None],
) -> None:
    """Fill every gradient that has room."""
    base_done = _vendor_multiplies(tensors)
    if base_done:
        input, layers = tensors[0], unpack(tensors, numbers)
        assert input is not None
        vendor.differentiate_base(input, layers, grad_outputs, grads)
        if input.dtype is not torch.bfloat16 and not any(numbers[1::NUMBERS]):
            return vendor.differentiate_adapters(input, layers, projected, grad_outputs, grads)
        grads = [None if i % TENSORS == 1 else g for i, g in enumerate(grads)]
    _native.module().lora_linear_backward(
        tensors, numbers, _words(states), projected, grad_outputs, grads, base_done, torch.get_num_threads()
    )


def _vendor_multiplies(tensors: Maybe) -> bool:
    """The first layer decides for its siblings."""
    x, W, *_ = tensors
    assert x is not None and W is not None
    return vendor_multiplies(x.dtype, x.numel() * W.shape[0])


def _words(states: Tensor | None) -> list[list[int]]:
    """Seed and offset of each mask."""
    return [] if states is None else states.tolist()
