"""A call packed into tensors and numbers, as torch.library, autograd and every implementation pass it on.

`tensors` are the input (N, d_in), then weight, lora_A, lora_B and bias of each layer, where an absent bias is None;
`numbers` are scaling and dropout_p of each. Gradients, and which of them are needed, stand in the order of `tensors`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kdkernels.contract import resolved
from kdkernels.ops.lora_linear.reference import accumulation_dtype

TENSORS, NUMBERS = 4, 2  # of a layer


class LoRA(NamedTuple):
    """One layer of a group: the arguments of `lora_linear` but the input."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0


def pack(input: Tensor, layers: Iterable[LoRA]) -> tuple[list[Tensor | None], list[float]]:
    """`tensors` and `numbers`."""
    tensors: list[Tensor | None] = [input]
    numbers: list[float] = []
    for layer in layers:
        tensors += layer[:TENSORS]  # type: ignore[arg-type]
        numbers += layer[TENSORS:]  # type: ignore[arg-type]
    return tensors, numbers


def unpack(tensors: Sequence[Any], numbers: Sequence[float]) -> list[LoRA]:
    """The layers."""
    return [LoRA(*operands, *numbers[NUMBERS * k : NUMBERS * (k + 1)]) for k, operands in enumerate(by_layer(tensors))]


def by_layer(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """What stands for weight, lora_A, lora_B and bias of each layer."""
    return [tensors[start : start + TENSORS] for start in range(1, len(tensors), TENSORS)]


def sharing(*operands: Sequence[Tensor | None]) -> list[list[int]]:
    """The places of layers that have the same tensors, by their places: of weights, or of weights and biases."""
    if len(operands[0]) == 1:
        return [[0]]
    found: dict[Any, list[int]] = {}
    for k, held in enumerate(zip(*operands, strict=True)):
        key = (None if x is None else (x.data_ptr(), x.shape, x.stride()) for x in held)
        found.setdefault(tuple(key), []).append(k)
    return list(found.values())


def room(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """For Y (N, d_out) of each layer, then for S (N, r)."""
    input, layers = tensors[0], by_layer(tensors)
    assert input is not None
    N, wide = input.shape[0], accumulation_dtype(input.dtype)
    outputs = [input.new_empty(N, W.shape[0]) for W, *_ in layers]
    return outputs + [input.new_empty(N, A.shape[0], dtype=wide) for _, A, *_ in layers]


def gradient_room(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """For the gradients in `needs`, contiguous whatever the strides of their tensors."""
    return [x.new_empty(*x.shape) if x is not None and need else None for x, need in zip(tensors, needs, strict=True)]


def readable(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors as they lie in memory; a bias that is absent, which under torch.library has no elements, is None."""
    found = [None if x is None else resolved(x) for x in tensors]
    for i in range(TENSORS, len(found), TENSORS):
        bias = found[i]
        found[i] = None if bias is not None and not bias.numel() else bias
    return found
