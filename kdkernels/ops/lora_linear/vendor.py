"""Layers with adapters where the vendor multiplies (`kdkernels.gemm`): torch's own products, in as few passes as go.

The masked parts are native's: dropout costs torch passes of its own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops.lora_linear.call import LoRA, by_layer, sharing

Maybe = Sequence[Tensor | None]


def finish(input: Tensor, layers: Sequence[LoRA], projected: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Fill each output (N, d_out), the first of `outputs`, from S = x̂ Aᵀ (N, r)."""
    if input.dtype is torch.bfloat16:
        for y, S, layer in zip(outputs, projected, layers, strict=False):
            y.copy_(joined(input, S, layer) if fits(S, layer) else in_float32(input, S, layer))
        return
    for first, *others in sharing([a.weight for a in layers], [a.bias for a in layers]):
        layer, y = layers[first], outputs[first]
        W = layer.weight.T
        torch.mm(input, W, out=y) if layer.bias is None else torch.addmm(layer.bias, input, W, out=y)
        for k in others:
            outputs[k].copy_(y)
    for y, S, layer in zip(outputs, projected, layers, strict=False):
        y.addmm_(layer.scaling * S, layer.lora_B.T.to(S.dtype))  # with an alpha of 0 a NaN would be lost


def fits(S: Tensor, layer: LoRA) -> bool:
    """Whether α S and B are finite and within bfloat16's range: an infinity would meet the zeros behind its term."""
    scaled, largest = layer.scaling * S, torch.finfo(torch.bfloat16).max
    return all(x.numel() == 0 or bool((x.abs().amax() <= largest).item()) for x in (scaled, layer.lora_B))


def in_float32(input: Tensor, S: Tensor, layer: LoRA) -> Tensor:
    """x Wᵀ + b + α S Bᵀ, step by step."""
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(input.float(), layer.weight.float(), bias) + layer.scaling * (S @ layer.lora_B.float().T)


def joined(input: Tensor, S: Tensor, layer: LoRA) -> Tensor:
    """x Wᵀ + b + α S Bᵀ in bfloat16 as one product of [x, α S] and [W, B], so that the vendor rounds the sum once.

    α S becomes three columns, each what the ones before it leave: 24 bits. Where B is wider than W, it takes two:
    [S₁, S₂, S₁] and [B₁, B₁, B₂] give the adapter's part to 16 bits, 8 more than the result has.
    """
    dtype, lora_B = layer.weight.dtype, layer.lora_B
    (first, second, third), (B, rest) = terms(layer.scaling * S, dtype, 3), terms(lora_B, dtype, 2)
    exact = lora_B.dtype is dtype
    columns = [input, first, second, third if exact else first]
    return F.linear(torch.cat(columns, 1), torch.cat([layer.weight, B, B, B if exact else rest], 1), layer.bias)


def terms(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """x as a sum of numbers of a narrower dtype; what is not finite stands in the first alone."""
    found = []
    for _ in range(count):
        found.append(x.to(dtype))
        x = torch.where(found[-1].isfinite(), x - found[-1], 0)
    return found


def differentiate_base(
    input: Tensor, layers: Sequence[LoRA], grad_outputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> None:
    """The base layers' part of the input's gradient, and those of weights, where there is room."""
    for dY, (dW, *_) in zip(grad_outputs, by_layer(grads), strict=True):
        if dW is not None:
            torch.mm(dY.T, input, out=dW)
    if (dX := grads[0]) is not None:
        for i, (first, *others) in enumerate(sharing([a.weight for a in layers])):
            dY = grad_outputs[first]
            for k in others:
                dY = dY + grad_outputs[k]
            torch.addmm(dX, dY, layers[first].weight, beta=int(i > 0), out=dX)


def differentiate_adapters(
    input: Tensor,
    layers: Sequence[LoRA],
    projected: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> None:
    """What is left of every gradient that has room, without dropout."""
    dX = grads[0]
    for dY, S, layer, (_, dA, dB, db) in zip(grad_outputs, projected, layers, by_layer(grads), strict=True):
        if db is not None:
            torch.sum(dY, 0, out=db)
        if dB is not None:
            dB.copy_(torch.mm(dY.T, S).mul_(layer.scaling))
        if dX is None and dA is None:
            continue
        dS = torch.mm(dY, layer.lora_B.to(S.dtype)).mul_(layer.scaling)
        if dA is not None:
            dA.copy_(torch.mm(dS.T, input))
        if dX is not None:
            dX.addmm_(dS, layer.lora_A.to(S.dtype))
