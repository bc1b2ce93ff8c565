"""The diagonal linear recurrence on GPUs, and its derivative, which is the same the other way round with λ*.

    h_t = λ h_{t−1} + u_t          `linear_recurrence_scan_kernel`      reads u, writes h
    g_t = ∂h_t + λ* g_{t+1}        `linear_recurrence_backward_kernel`  reads ∂h and h, writes g, ∂h_0 = λ* g_1, and the
                                                                        sums of g_t h*_{t−1} over its steps
    ∂λ                             `linear_recurrence_sum_kernel`       those of all chunks and sequences

Where N · n states do not fill the device time is cut into chunks (`chunks_of`). Then a launch comes first that leaves
the last state of each as if it were the first, and λ^length (`linear_recurrence_ends_kernel`): u is read twice, h
written once. From these each program makes the state before its own chunk, which spares a launch in between.

Sums over the steps of a tile are in the operands' dtype, of tiles, chunks and sequences in float64, in an order that
depends on shapes and the GPU alone, without atomics. What chunks hand on is float64 too: λ^length, too large or too
small for float32, is not for float64. What remains where time is cut: a λ^length beyond float64 makes an infinity of a
state that the steps would have kept finite only if that state is below 10⁻²⁷⁰, and an infinite state times a λ^length
that is 0 by underflow is NaN, where steps keep it infinite.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from kdkernels.contract import readable
from kdkernels.launch import cdiv, on_its_device
from kdkernels.ops.linear_recurrence import kernels

BLOCK = 32  # lanes of a program: one warp, in which no number belongs to two threads unless they run in step
STEPS, BYTES = 8, 64  # of a tile, at most; a lane has one at hand and one, or a second operand's, on its way
LANES = 256  # of a multiprocessor: with as many, their loads take as long as the memory needs for them
LEAST_STEPS = 256  # that are cut: fewer take less time than another launch
PROCESSORS = 132  # of a GPU that is not there
SUM = (4, 64, 32)  # steps, rows and columns of a program
GROUP = SUM[0] * SUM[1]


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors it has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


@lru_cache(1024)
def chunks_of(states: int, T: int, processors: int) -> tuple[int, int]:
    """Into how many chunks T steps of N · n states are cut, and the steps of each.

    As many as fill the GPU, processors · LANES / states, but no more than √T: the program of the last chunk reads the
    ends of all others before it begins, and they should not be more than its steps. No GPU has measured LANES and
    LEAST_STEPS: LANES · BYTES is about what a multiprocessor of an H100 must have under way to draw its share of the
    memory's rate at a latency of a microsecond, with half the time spent on something else.
    """
    wanted = min(processors * LANES // max(states, 1), isqrt(T))
    if wanted < 2 or T < LEAST_STEPS:
        return 1, max(T, 1)
    length = cdiv(cdiv(T, wanted), STEPS) * STEPS
    return cdiv(T, length), length


def forward(
    Lambda: Tensor, input: Tensor, initial_state: Tensor | None, reverse: bool, in_place: bool = False
) -> Tensor:
    """h (N, T, n), in new memory or where the input lies."""
    Lambda, input, start = readable(Lambda), readable(input), readable(initial_state)
    states = input if in_place else torch.empty_like(input)
    if input.numel():
        with on_its_device(input):
            call = _Call(input, Lambda)
            u, factor, initial = map(parts, (input, Lambda, start))
            ends = call.ends(u, factor, initial, reverse, False)
            constants = (call.shared, reverse, call.is_complex, call.steps, BLOCK)
            kernels.scan(call.grid, (u, factor, initial, ends, parts(states)), call.sizes, (), constants, 1, 1)
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
    grad, Lambda, states, start = readable(grad), readable(Lambda), readable(states), readable(initial_state)
    N, _, n = states.shape
    rooms = (Lambda.shape, None if in_place else states.shape, (N, n))
    d_Lambda, g, d_initial = found = [
        None if not need else grad if shape is None else states.new_empty(shape)
        for shape, need in zip(rooms, needs, strict=True)
    ]
    if not states.numel():
        for x in (d_Lambda, d_initial):
            x is None or x.zero_()
    elif any(needs):
        with on_its_device(grad):
            call = _Call(grad, Lambda)
            arriving, factor, h, initial = map(parts, (grad, Lambda, states, start))
            ends = call.ends(arriving, factor, None, not reverse, True)
            sums, rows = parts(d_Lambda), call.chunks * N if call.shared else call.chunks
            if sums is not None and rows > 1:
                sums = sums.new_empty((call.chunks * N * n * call.parts,), dtype=torch.float64)
            tensors = (arriving, factor, None if sums is None else h, initial, ends, parts(g), sums, parts(d_initial))
            constants = (call.shared, not reverse, call.is_complex, call.steps, BLOCK)
            kernels.backward(call.grid, tensors, call.sizes, (), constants, 1, 1)
            if d_Lambda is not None and rows > 1:
                _sum(sums, parts(d_Lambda), rows)
    return found


class _Call:
    """How a call is cut."""

    def __init__(self, input: Tensor, Lambda: Tensor) -> None:
        N, T, n = input.shape
        self.shape = N, n
        self.shared = len(Lambda) == 1
        self.is_complex = input.is_complex()
        self.parts = 2 if self.is_complex else 1
        self.steps = min(STEPS, BYTES // input.itemsize)
        self.chunks, length = chunks_of(N * n, T, processors(input.device))
        self.grid = (cdiv(N * n, BLOCK), self.chunks)
        self.sizes = (N * n, n, T, length)

    def ends(self, u: Any, Lambda: Any, initial: Any, reverse: bool, conjugate: bool) -> Any:
        """What chunks need of those before them."""
        if self.chunks == 1:
            return None
        ends = u.new_empty((self.chunks, *self.shape, self.parts), dtype=torch.float64)
        constants = (self.shared, conjugate, reverse, self.is_complex, self.steps, BLOCK)
        kernels.ends(self.grid, (u, Lambda, initial, ends), self.sizes, (), constants, 1, 1)
        return ends


def _sum(x: Any, out: Any, rows: int) -> None:
    """out = Σ x over (rows, cols)."""
    cols = out.numel()
    while rows > 1:
        groups = cdiv(rows, GROUP)
        to = out if groups == 1 else x.new_empty((groups, cols))
        kernels.sum((cdiv(cols, SUM[2]), groups), (x, to), (rows, cols), (), SUM, 4, 1)
        x, rows = to, groups


def parts(x: Tensor | None) -> Any:
    """Real numbers, two for a complex one."""
    return torch.view_as_real(x) if x is not None and x.is_complex() else x
