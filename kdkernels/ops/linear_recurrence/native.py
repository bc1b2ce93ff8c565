"""The recurrence in C++ on the CPU.

The kernels are in csrc/cpu/linear_recurrence.cpp, their formulas in csrc/include/kdkernels/linear_recurrence.h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import _native
from kdkernels.contract import resolved


def forward(
    Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool, in_place: bool = False
) -> Tensor:
    """h (N, T, n), in new memory or where the input lies."""
    input = readable(input)
    states = input if in_place else torch.empty_like(input)
    _native.module().linear_recurrence(
        readable(Lambda), input, _maybe(initial_state), states, reverse, torch.get_num_threads()
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
    shapes = (Lambda.shape, states.shape, (N, n))
    g = grad if in_place else torch.empty_like(grad)
    rooms = (None, g, None)
    found = [
        (states.new_empty(shape) if room is None else room) if need else None
        for shape, room, need in zip(shapes, rooms, needs, strict=True)
    ]
    _native.module().linear_recurrence_backward(
        grad, Lambda, states, _maybe(initial_state), g, found[0], found[2], reverse, torch.get_num_threads()
    )
    return found


def readable(x: Tensor) -> Tensor:
    """As kernels read it."""
    return resolved(x).contiguous()


def _maybe(x: Tensor | None) -> Tensor | None:
    return None if x is None else readable(x)
