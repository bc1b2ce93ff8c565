"""The definition, in plain PyTorch: the oracle of every other implementation."""

import torch
from torch import Tensor


def linear_recurrence(Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """(..., n), (..., T, n), (..., n) -> (..., T, n): h_t = λ ⊙ h_{t−1} + u_t, or h_t = λ ⊙ h_{t+1} + u_t."""
    if input.shape[-2] < 2:  # what enters no step has a gradient of 0 all the same
        input = input - sum(x[..., :0].sum() for x in (Lambda, initial_state) if x is not None)
    steps = input.unbind(-2)  # (..., n) each
    if not steps:
        return input
    state, states = initial_state, []
    for u in reversed(steps) if reverse else steps:
        state = u if state is None else torch.addcmul(u, Lambda, state)
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, -2)
