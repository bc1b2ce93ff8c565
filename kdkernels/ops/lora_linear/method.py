"""What a call costs beside the base layer: LoRA adds little arithmetic, so bytes decide."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kdkernels.backend import Cost


def costs(input: Tensor, layer: Any, needs: Mapping[str, bool]) -> tuple[Cost, ...]:
    """Forward and backward: `base` is the linear layer alone, `fused` what runs, `eager` the steps of PEFT.

    Passes over activations beyond the base layer's: fused reads x for S, dY for dS and dB together, and x for dA;
    with dropout it touches dX once more. eager makes about 9.5 forward and 11.5 backward with dropout, 4 and 6 without.
    """
    N, d_in = input.shape
    d_out, r = layer.lora_B.shape
    size = input.element_size()
    backward = needs["input"] or needs["lora_A"] or needs["lora_B"] or needs["weight"]
    base_flops = 2 * N * d_in * d_out * (1 + needs["input"] + needs["weight"])
    x, y, w = N * d_in * size, N * d_out * size, d_in * d_out * size
    base_bytes = x + y + w + (needs["input"] * (y + x + w)) + needs["weight"] * (x + y + w)
    base = Cost("base", base_flops, base_bytes)
    low_rank = 2 * N * r * (d_in + d_out)
    flops = base_flops + low_rank
    flops += 2 * N * r * (d_out * (needs["lora_B"] + (needs["lora_A"] or needs["input"])))
    flops += 2 * N * r * d_in * (needs["lora_A"] + needs["input"])
    drops = layer.dropout_p > 0
    fused = base_bytes + x + backward * (y + needs["lora_A"] * x + needs["input"] * drops * 2 * x)
    forward_passes, backward_passes = (9.5, 11.5) if drops else (4, 6)
    eager = base_bytes + int((forward_passes + backward * backward_passes) * (x + y) / 2)
    return base, Cost("fused", flops, fused), Cost("eager", flops, eager)
