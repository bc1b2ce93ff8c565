"""The recurrence in C++ on the CPU.

The kernels are in csrc/cpu/linear_recurrence.cpp, their formulas in csrc/include/kdkernels/linear_recurrence.h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import _native
from kdkernels.contract import readable


def forward(
    Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool, in_place: bool = False
) -> Tensor:
    """h (N, T, n), in new memory or where the input lies."""
    input = readable(input)
    states = input if in_place else torch.empty_like(input)
    _native.module().linear_recurrence(
        readable(Lambda), input, readable(initial_state), states, reverse, torch.get_num_threads()
    )
    return states


def backward(
    grad: Tensor,
    Lambda: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    needs: Sequence[bool],
    in_place: bool = False,
) -> list[Tensor | None]:
    """The gradients of Λ, the input and the initial state that are needed; the input's in new memory or in `grad`."""
    grad, Lambda, states = map(readable, (grad, Lambda, states))
    N, _, n = states.shape
    g = grad if in_place else torch.empty_like(grad)
    d_Lambda = torch.empty_like(Lambda) if needs[0] else None
    d_initial = states.new_empty(N, n) if needs[2] else None
    _native.module().linear_recurrence_backward(
        grad, Lambda, states, readable(initial_state), g, d_Lambda, d_initial, reverse, torch.get_num_threads()
    )
    return [d_Lambda, g if needs[1] else None, d_initial]
