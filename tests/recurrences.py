"""What the tests of the linear recurrence share."""

import pytest
import torch

import kdkernels as kd
from kdkernels.testing.linear_recurrence.inputs import make_inputs

native_only = pytest.mark.native
BACKENDS = ("reference", pytest.param("native", marks=native_only))
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
WIDE = (torch.float64, torch.complex128)


def normal(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def operands(dtype=torch.complex128, grad=True, N=3, T=7, n=5, own=False, initial=True):
    """Λ, the input and the initial state, if any."""
    inputs = make_inputs(N, T, n, own=own, initial=initial, dtype=dtype)
    Lambda = inputs.Lambda if own else inputs.Lambda[0]
    found = [x for x in (Lambda, inputs.input, inputs.initial_state) if x is not None]
    return [x.requires_grad_(grad) for x in found]


def results(tensors, arriving=None, **options):
    """The states, and the gradients of the tensors that require one."""
    h = kd.linear_recurrence(*tensors, **options)
    leaves = [x for x in tensors if x.requires_grad]
    arriving = normal(*h.shape, dtype=h.dtype, seed=9) if arriving is None else arriving
    return [h.detach(), *torch.autograd.grad(h, leaves, arriving)] if leaves else [h]


def loop(Lambda, input, initial_state=None, reverse=False):
    """The formula, each step by itself."""
    order = list(range(input.shape[-2]))[:: -1 if reverse else 1]
    states = {}
    state = torch.zeros_like(input[..., 0, :]) if initial_state is None else initial_state
    for t in order:
        state = states[t] = Lambda * state + input[..., t, :]
    return torch.stack([states[t] for t in range(len(order))], -2)


def all_equal(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
