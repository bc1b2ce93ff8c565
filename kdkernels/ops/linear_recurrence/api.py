"""`linear_recurrence`: the documented function, its checks and its choice of implementation."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import Contract, broadcast, show
from kdkernels.ops.linear_recurrence import reference, schema
from kdkernels.plans import Plans

DTYPES = (*backends.ANY_DTYPE, torch.complex64, torch.complex128)
HALVES = (torch.bfloat16, torch.float16)
CONTRACT = Contract(DTYPES, input="* T n", Lambda="* n", initial_state="* n?")
PLANS = Plans()


def linear_recurrence(
    Lambda: Tensor,
    input: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The states of a diagonal linear recurrence, h_t = λ ⊙ h_{t−1} + u_t for t = 1 … T.

    The inner loop of LRU (Orvieto et al. 2023), S4D, S5 and their kin. Any λ is served; one with |λ| > 1 grows.

    Args:
        Lambda: (n) for all sequences, or (..., n) whose leading dimensions broadcast to the input's: (H, n) beside an
            input of (batch, H, T, n) gives each channel its own. Real or complex.
        input: u, (..., T, n), real or complex. Dtypes are promoted to a common one.
        initial_state: h_0, (..., n), likewise; 0 where it is None.
        reverse: run from the last step to the first, h_t = λ ⊙ h_{t+1} + u_t; then the initial state is h_{T+1}.
        backend: `"auto"`, `"reference"`, `"native"` or `"triton"`. One that was asked for by name and cannot serve
            raises.

    Returns:
        h, (..., T, n), of the promoted dtype. float16 and bfloat16 are computed in float32 and rounded once.

    Gradients, of as many orders as are asked for: backward is the same recurrence the other way round,
    g_t = ∂h_t + λ* ⊙ g_{t+1}, with ∂u = g and ∂λ = Σ_t g_t ⊙ h*_{t−1}. It keeps the output and nothing else of its
    size, needs one more tensor of that size, and sums ∂λ in float64. The same bits on every run and for every number of
    threads.

    Raises:
        TypeError: an argument is no tensor of these dtypes, or reverse no bool.
        ValueError: shapes or devices do not fit, or the backend cannot serve.
    """
    plan = PLANS.find(
        (Lambda, input, initial_state),
        (reverse, backend, backends.default(), torch.is_grad_enabled()),
        lambda: _decide(Lambda, input, initial_state, reverse, backend),
    )
    start = initial_state
    if plan.casts:
        Lambda, input = Lambda.to(plan.compute), input.to(plan.compute)
        start = None if start is None else start.to(plan.compute)
    if plan.run is None:
        states = reference.linear_recurrence(Lambda, input, start, reverse)
        return states if states.dtype is plan.dtype else states.to(plan.dtype)
    n = input.shape[-1]
    Lambda = Lambda.reshape(1, n) if plan.shared else Lambda.expand(*plan.leading, n).reshape(plan.sequences, n)
    if start is not None and start.shape != (plan.sequences, n):
        start = start.expand(*plan.leading, n).reshape(plan.sequences, n)
    flat = input.dim() == 3
    points = input if flat else input.reshape(plan.sequences, *input.shape[-2:])
    states = plan.run(Lambda, points, start, reverse, plan.backend)
    states = states if flat else states.reshape(input.shape)
    return states if states.dtype is plan.dtype else states.to(plan.dtype)


class _Plan(NamedTuple):
    """What is decided of a call."""

    backend: str
    run: Callable[..., Tensor] | None  # of the operator, in the way that such tensors need; None: the reference
    dtype: torch.dtype  # of the result
    compute: torch.dtype
    casts: bool  # whether some argument has another dtype
    leading: tuple[int, ...]
    sequences: int
    shared: bool  # one Λ for all sequences


def _decide(Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool, backend: str) -> _Plan:
    if not isinstance(reverse, bool):
        raise TypeError(f"reverse is {type(reverse).__name__}, but must be a bool")
    given = {"input": input, "Lambda": Lambda, "initial_state": initial_state}
    CONTRACT.bind(given)
    leading = tuple(input.shape[:-2])
    tensors = [x for x in (Lambda, input, initial_state) if x is not None]
    for name, x in given.items():
        if x is not None and name != "input" and broadcast(leading, tuple(x.shape[:-1]), name, "input") != leading:
            raise ValueError(
                f"{name} has leading dimensions {show(x.shape[:-1])}, which must broadcast to input's {show(leading)}"
            )
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    compute = torch.float32 if dtype in HALVES else dtype
    chosen = backends.choose("linear_recurrence", backend, input.device.type, (compute,))
    run = None
    if chosen.backend != "reference":
        backends.refuse_tangents("linear_recurrence", tensors)
        run = schema.linear_recurrence.route(tensors)
    casts = any(x.dtype is not compute for x in tensors)
    return _Plan(chosen.backend, run, dtype, compute, casts, leading, prod(leading), prod(Lambda.shape[:-1]) == 1)


def _explain(
    Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool, backend: str
) -> backends.Explanation:
    plan = _decide(Lambda, input, initial_state, reverse, backend)
    device, size = input.device.type, plan.compute.itemsize
    chosen = backends.choose("linear_recurrence", backend, device, (plan.compute,))
    per_state = 8 if plan.compute.is_complex else 2
    cost = backends.Cost("scan", per_state * input.numel(), 2 * size * input.numel())
    reasons = backends.passed_over("linear_recurrence", chosen, device, (plan.compute,))
    return backends.Explanation("linear_recurrence", chosen.backend, "scan", reasons, (cost,))


backends.register_explainer(linear_recurrence, _explain)
