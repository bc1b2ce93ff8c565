"""The definition, in plain PyTorch: the oracle of every other implementation."""

import torch
from torch import Tensor


def linear_recurrence(Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """(..., n), (..., T, n), (..., n) -> (..., T, n): h_t = λ ⊙ h_{t−1} + u_t, or h_t = λ ⊙ h_{t+1} + u_t."""
    steps = input.unbind(-2)  # (..., n) each
    state, states = initial_state, []
    for u in reversed(steps) if reverse else steps:
        state = u if state is None else torch.addcmul(u, Lambda, state)
        states.append(state)
    if not states:
        return torch.zeros_like(input)
    # without a state before it the first one is the input itself, which Λ of another shape must not change
    return torch.stack(states[::-1] if reverse else states, -2)
