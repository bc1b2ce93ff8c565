"""Linear layers with adapters in C++ on the CPU, and who multiplies there.

The kernels are in csrc/cpu/lora_linear.cpp, their formulas in csrc/include/kdkernels/lora_linear.h.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import _native
from kdkernels.contract import without_autocast
from kdkernels.gemm import vendor_multiplies
from kdkernels.ops.lora_linear import vendor
from kdkernels.ops.lora_linear.call import NUMBERS, LoRA, gradient_room, readable, unpack

Maybe = Sequence[Tensor | None]


def forward(tensors: Maybe, numbers: Sequence[float], states: Tensor | None) -> list[Tensor]:
    """Y of each layer, then S (see `schema.lora_linear`)."""
    by_vendor = _vendor_multiplies(tensors)
    found = _native.module().lora_linear_forward(
        tensors, numbers, _words(states), not by_vendor, torch.get_num_threads()
    )
    if by_vendor:
        input, layers = _as_layers(tensors, numbers)
        with without_autocast():
            vendor.finish(input, layers, found[len(layers) :], found)
    return found


def backward(
    tensors: Maybe,
    numbers: Sequence[float],
    states: Tensor | None,
    projected: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `tensors` that are needed."""
    by_vendor = _vendor_multiplies(tensors)
    rooms: list[Any] = [need or None for need in needs]
    if by_vendor:
        rooms = gradient_room(tensors, needs)
        input, layers = _as_layers(tensors, numbers)
        composed = input.dtype is not torch.bfloat16 and not any(numbers[1::NUMBERS])
        with without_autocast():
            vendor.differentiate_base(input, layers, grad_outputs, rooms)
            if composed:
                vendor.differentiate_adapters(input, layers, projected, grad_outputs, rooms)
        if composed:
            return rooms
    return _native.module().lora_linear_backward(
        tensors, numbers, _words(states), projected, grad_outputs, rooms, by_vendor, torch.get_num_threads()
    )


def _as_layers(tensors: Maybe, numbers: Sequence[float]) -> tuple[Tensor, list[LoRA]]:
    operands = readable(tensors)
    assert operands[0] is not None
    return operands[0], unpack(operands, numbers)


def _vendor_multiplies(tensors: Maybe) -> bool:
    """The first layer decides for its siblings."""
    x, W, *_ = tensors
    assert x is not None and W is not None
    return vendor_multiplies(x.dtype, x.numel() * W.shape[0])


def _words(states: Tensor | None) -> list[list[int]]:
    """Seed and offset of each mask."""
    return [] if states is None else states.tolist()
