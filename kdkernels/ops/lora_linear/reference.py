"""The definition of a linear layer with a low-rank adapter in plain PyTorch: on any device, differentiable twice.

    Y = x Wᵀ + b + α S Bᵀ,    S = x̂ Aᵀ,    x̂ = mask ⊙ x / (1 − p)

Dropout acts on the adapter's input alone (Hu et al. 2021, arXiv 2106.09685; PEFT).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.philox import keep_mask


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of sums, and of the projected points S."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def dropped(x: Tensor, state: Tensor | None, p: float) -> Tensor:
    """(N, d_in) -> (N, d_in): mask ⊙ x / (1 − p). A dropped element is 0, whatever it was."""
    if p == 0:
        return x
    assert state is not None
    return torch.where(keep_mask(state, x.shape[0], x.shape[1], p), x * (1 / (1 - p)), 0)


def adapted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    state: Tensor | None,
) -> Tensor:
    """(N, d_in) -> (N, d_out), with every step in the accumulation dtype and the result in that of x."""
    dtype = accumulation_dtype(x.dtype)
    device = x.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # operands were cast before
        wide = x.to(dtype)
        W, A, B = weight.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
        S = F.linear(dropped(wide, state, dropout_p), A)  # (N, r)
        Y = F.linear(wide, W, None if bias is None else bias.to(dtype)) + scaling * F.linear(S, B)
        return Y.to(x.dtype)


def eager(
    x: Tensor,
    dropped_x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """What PEFT computes, step by step in the dtypes of its inputs: the baseline of benchmarks and error budgets.

    `dropped_x` is x in lora_A's dtype after dropout.
    """
    Y = F.linear(x, weight, bias)
    return (Y + F.linear(F.linear(dropped_x, lora_A), lora_B) * scaling).to(Y.dtype)
