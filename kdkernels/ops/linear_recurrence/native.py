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


def norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The rows of (..., H), normalised."""
    input = readable(input)
    out = torch.empty_like(input)
    _native.module().narrow_norm(
        _rows(input), readable(weight), readable(bias), eps, _rows(out), torch.get_num_threads()
    )
    return out


def norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor, eps: float, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the input, the weight and the bias that are needed."""
    grad, input, weight = map(readable, (grad, input, weight))
    d_input, d_weight, d_bias = found = rooms((input, weight, weight), needs)
    _native.module().narrow_norm_backward(
        _rows(grad), _rows(input), weight, eps, _rows(d_input), d_weight, d_bias, torch.get_num_threads()
    )
    return found


def mix(x: Tensor, tensors: Sequence[Tensor], inner: Tensor | None, outer: Tensor | None) -> Tensor:
    """x (N, T, H) + m₂ ⊙ (V z + v) ⊙ σ(G z + g), z = m₁ ⊙ gelu(y + D ⊙ u), of y, u, D, V, v, G and g."""
    x, (y, u, *parameters) = readable(x), map(readable, tensors)
    out = torch.empty_like(x)
    _native.module().gated_mix(
        *map(_rows, (x, y, u)), *parameters, *map(_rows, (readable(inner), readable(outer))),
        x.shape[1], _rows(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def mix_backward(
    grad: Tensor, tensors: Sequence[Tensor], inner: Tensor | None, outer: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of y, u, D, V, v, G and g that are needed."""
    grad, (y, u, *parameters) = readable(grad), map(readable, tensors)
    found = rooms((y, u, *parameters), needs)
    _native.module().gated_mix_backward(
        *map(_rows, (grad, y, u)), *parameters, *map(_rows, (readable(inner), readable(outer))),
        y.shape[1], [*map(_rows, found[:2]), *found[2:]], torch.get_num_threads(),
    )  # fmt: skip
    return found


def rooms(like: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """For the gradients that are needed."""
    return [x.new_empty(x.shape) if need else None for x, need in zip(like, needs, strict=True)]


def _rows(x: Tensor | None) -> Tensor | None:
    """(..., H) -> (rows, H)."""
    return None if x is None else x.view(x.shape[:-1].numel(), x.shape[-1])
