"""What the tests of layers with adapters share."""

import pytest
import torch

import kdkernels as kd

native_only = pytest.mark.native
BACKENDS = ("reference", pytest.param("native", marks=native_only))


def operands(N=7, d_in=12, d_out=9, r=3, dtype=torch.float64, grad=True):
    draw = torch.Generator().manual_seed(3)
    shapes = ((N, d_in), (d_out, d_in), (r, d_in), (d_out, r), (d_out,))
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def call(x, weight, lora_A, lora_B, bias, **options):
    return kd.lora_linear(x, weight, lora_A, lora_B, bias=bias, scaling=1.5, **options)
