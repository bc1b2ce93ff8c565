"""The kernels of the diagonal linear recurrence on GPUs, and what launches each; triton.py says what they are for.

A lane has one state of one sequence, of N · n. States do not meet, so a lane is alone from the first step to the last.
The loads of several steps are issued before the first of them is used: that is what keeps the memory busy. A number is
read and written by its lane alone, and read first, so a result may lie where its input does. Every operand is
contiguous.

A number is two parts: of a complex one re and im, which lie beside each other; of a real one itself, twice, of which
the second is never looked at.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kdkernels.launch import Launcher


@triton.jit
def _read(ptr, places, mask, COMPLEX: tl.constexpr):
    """The numbers at these places; 0 where they are masked."""
    if COMPLEX:
        both = tl.load(ptr + (2 * places[:, None] + tl.arange(0, 2)[None, :]), mask=mask[:, None], other=0.0)
        re, im = tl.split(both)
    else:
        re = tl.load(ptr + places, mask=mask, other=0.0)
        im = re
    return re, im


@triton.jit
def _write(ptr, places, mask, re, im, COMPLEX: tl.constexpr):
    """The other way round."""
    if COMPLEX:
        both = tl.join(re, im).to(ptr.dtype.element_ty)
        tl.store(ptr + (2 * places[:, None] + tl.arange(0, 2)[None, :]), both, mask=mask[:, None])
    else:
        tl.store(ptr + places, re.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _step(a_re, a_im, x_re, x_im, u_re, u_im, COMPLEX: tl.constexpr):
    """a x + u."""
    if COMPLEX:
        re = u_re + a_re * x_re - a_im * x_im
        im = u_im + a_re * x_im + a_im * x_re
    else:
        re = u_re + a_re * x_re
        im = re
    return re, im


@triton.jit
def _factor(Lambda_ptr, lanes, mask, n, SHARED: tl.constexpr, CONJUGATE: tl.constexpr, COMPLEX: tl.constexpr):
    """λ of these lanes, or λ*."""
    re, im = _read(Lambda_ptr, lanes % n if SHARED else lanes, mask, COMPLEX)
    if CONJUGATE:
        im = -im
    return re, im


@triton.jit
def _rows(lanes, n, T, step, REVERSE: tl.constexpr):
    """Where the numbers of a step lie, (N, T, n), and how much further those of the next."""
    time = T - 1 - step if REVERSE else step
    return (lanes // n * T + time) * n + lanes % n, -n if REVERSE else n


@triton.jit
def _tile(ptr, places, stride, mask, first, stop, COMPLEX: tl.constexpr, STEPS: tl.constexpr):
    """The numbers of the steps from `first` on: 0 from `stop` on."""
    found: tl.tuple = ()
    for k in tl.static_range(STEPS):
        found += _read(ptr, places + k * stride, mask & (first + k < stop), COMPLEX)
    return found


@triton.jit
def _scan(
    u_ptr, h_ptr, places, stride, mask, first, stop, a_re, a_im, re, im, there,
    CARRY: tl.constexpr, COMPLEX: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """x = a x + u from the state (re, im), if it is `there`: every x to h_ptr, or the last one.

    As CARRY, a is a power of λ that may be infinite: nothing grows from 0. A tile is loaded while the one before it is
    summed; loaded just before, compilers would move each load to its use, and wait for each.
    """
    tile = _tile(u_ptr, places, stride, mask, first, stop, COMPLEX, STEPS)
    while first < stop:
        ahead = _tile(u_ptr, places + STEPS * stride, stride, mask, first + STEPS, stop, COMPLEX, STEPS)
        for k in tl.static_range(STEPS):
            by_re, by_im = a_re, a_im
            if CARRY or k == 0:
                moving = (re != 0) | (im != 0) if CARRY else there
                by_re, by_im = tl.where(moving, a_re, 0.0), tl.where(moving, a_im, 0.0)
            next_re, next_im = _step(by_re, by_im, re, im, tile[2 * k], tile[2 * k + 1], COMPLEX)
            now = first + k < stop
            if h_ptr is None:
                next_re, next_im = tl.where(now, next_re, re), tl.where(now, next_im, im)
            else:
                _write(h_ptr, places + k * stride, mask & now, next_re, next_im, COMPLEX)
            re, im = next_re, next_im
        tile = ahead
        there = first < stop
        first += STEPS
        places += STEPS * stride
    return re, im


@triton.jit
def _before(
    initial_ptr, ends_ptr, lanes, mask, count, chunk, dtype: tl.constexpr, COMPLEX: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """The state before a chunk, and whether there is one: without it the first is the input itself, whatever λ is."""
    re = tl.zeros_like(lanes).to(dtype)
    im, there = re, chunk > 0
    if initial_ptr is not None:
        re, im = _read(initial_ptr, lanes, mask, COMPLEX)
        there = chunk >= 0
    if ends_ptr is not None:  # noqa: SIM102  one is decided as it compiles, the other as it runs
        if chunk > 0:  # Horner's rule
            a_re, a_im = _read(ends_ptr, (tl.num_programs(1) - 1) * count + lanes, mask, COMPLEX)
            end_re, end_im = _read(ends_ptr, lanes, mask, COMPLEX)
            end_re, end_im = _scan(
                ends_ptr, None, count + lanes, count, mask, chunk * 0 + 1, chunk, a_re, a_im, end_re, end_im, chunk > 0,
                True, COMPLEX, STEPS,
            )  # fmt: skip
            re, im = end_re.to(dtype), end_im.to(dtype)
    return re, im, there


SIZES = ["count", "n", "T", "length"]


@triton.jit(do_not_specialize=SIZES)
def linear_recurrence_ends_kernel(
    u_ptr,  # (N, T, n)
    Lambda_ptr,  # (1 or N, n)
    initial_ptr,  # (N, n), or None
    ends_ptr,  # (chunks, N, n) float64
    count: tl.int64, n: tl.int64, T: tl.int64, length: tl.int64,  # N · n; steps of a chunk, whole tiles
    SHARED: tl.constexpr, CONJUGATE: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last state of each chunk as if none were before it; the last one's nobody needs: λ to their length instead.

    In float64: without what was before it a state may be larger than it is, and so may its error. The power is
    multiplied up step by step, for squares of squares double their errors.
    """
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    mask = lanes < count
    a_re, a_im = _factor(Lambda_ptr, lanes, mask, n, SHARED, CONJUGATE, COMPLEX)
    a_re, a_im = a_re.to(tl.float64), a_im.to(tl.float64)
    if chunk < tl.num_programs(1) - 1:
        re = tl.zeros_like(a_re)
        im, there = re, chunk < 0
        if initial_ptr is not None:
            there = chunk == 0
            re, im = _read(initial_ptr, lanes, mask & there, COMPLEX)
            re, im = re.to(tl.float64), im.to(tl.float64)
        start = chunk * length
        places, stride = _rows(lanes, n, T, start, REVERSE)
        re, im = _scan(
            u_ptr, None, places, stride, mask, start, start + length, a_re, a_im, re, im, there, False, COMPLEX, STEPS
        )
    else:
        re, im = a_re, a_im
        step = chunk * 0 + 1
        while step < length:
            re, im = _step(a_re, a_im, re, im, 0.0, 0.0, COMPLEX)
            step += 1
    _write(ends_ptr, chunk * count + lanes, mask, re, im, COMPLEX)


@triton.jit(do_not_specialize=SIZES)
def linear_recurrence_scan_kernel(
    u_ptr,  # (N, T, n)
    Lambda_ptr,  # (1 or N, n)
    initial_ptr,  # (N, n), or None
    ends_ptr,  # (chunks, N, n) float64, or None for one chunk
    h_ptr,  # (N, T, n), may be u
    count: tl.int64, n: tl.int64, T: tl.int64, length: tl.int64,  # N · n; steps of a chunk, whole tiles
    SHARED: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h_t = λ h_{t−1} + u_t of a chunk of time, from the state that the chunks before it leave."""
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    mask = lanes < count
    a_re, a_im = _factor(Lambda_ptr, lanes, mask, n, SHARED, False, COMPLEX)
    re, im, there = _before(initial_ptr, ends_ptr, lanes, mask, count, chunk, a_re.dtype, COMPLEX, STEPS)
    start = chunk * length
    places, stride = _rows(lanes, n, T, start, REVERSE)
    stop = tl.minimum(start + length, T)
    _scan(u_ptr, h_ptr, places, stride, mask, start, stop, a_re, a_im, re, im, there, False, COMPLEX, STEPS)


@triton.jit(do_not_specialize=SIZES)
def linear_recurrence_backward_kernel(
    grad_ptr,  # (N, T, n)
    Lambda_ptr,  # (1 or N, n)
    h_ptr,  # (N, T, n), or None where sums are
    initial_ptr,  # (N, n), or None
    ends_ptr,  # (chunks, N, n) float64, or None for one chunk
    g_ptr,  # (N, T, n), may be grad; or None
    sums_ptr,  # (chunks, N, n), or None: each chunk's Σ g_t h*_{t−1}
    first_ptr,  # (N, n), or None: λ* g_1
    count: tl.int64, n: tl.int64, T: tl.int64, length: tl.int64,  # N · n; steps of a chunk, whole tiles
    SHARED: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g_t = ∂h_t + λ* g_{t+1} of a chunk, and what is summed of it; REVERSE and chunks are those of this recurrence."""
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    mask = lanes < count
    a_re, a_im = _factor(Lambda_ptr, lanes, mask, n, SHARED, True, COMPLEX)
    re, im, there = _before(None, ends_ptr, lanes, mask, count, chunk, a_re.dtype, COMPLEX, STEPS)
    start = chunk * length
    places, stride = _rows(lanes, n, T, start, REVERSE)
    zero = tl.zeros_like(a_re)
    sum_re = zero.to(tl.float64)
    sum_im = sum_re
    first, stop = start, tl.minimum(start + length, T)
    while first < stop:
        grads = _tile(grad_ptr, places, stride, mask, first, T, COMPLEX, STEPS)
        if sums_ptr is not None:  # the state before a step is that of the next one here
            states = _tile(h_ptr, places + stride, stride, mask, first + 1, T, COMPLEX, STEPS)
        part_re, part_im = zero, zero
        for k in tl.static_range(STEPS):
            now = first + k < T
            u_re, u_im = grads[2 * k], grads[2 * k + 1]
            by_re, by_im = a_re, a_im
            if k == 0:
                by_re, by_im = tl.where(there, a_re, 0.0), tl.where(there, a_im, 0.0)
            next_re, next_im = _step(by_re, by_im, re, im, u_re, u_im, COMPLEX)
            re, im = tl.where(now, next_re, re), tl.where(now, next_im, im)
            if g_ptr is not None:
                _write(g_ptr, places + k * stride, mask & now, re, im, COMPLEX)
            if sums_ptr is not None:
                more_re, more_im = _against(re, im, states[2 * k], states[2 * k + 1], part_re, part_im, COMPLEX)
                has = first + k + 1 < T  # else there is no state: 0 would do, but for a g that is not finite
                part_re, part_im = tl.where(has, more_re, part_re), tl.where(has, more_im, part_im)
        sum_re += part_re.to(tl.float64)
        sum_im += part_im.to(tl.float64)
        there = first < stop
        first += STEPS
        places += STEPS * stride
    last = chunk == tl.num_programs(1) - 1
    if sums_ptr is not None:
        if initial_ptr is not None:
            h_re, h_im = _read(initial_ptr, lanes, mask & last, COMPLEX)
            more_re, more_im = _against(re, im, h_re, h_im, zero, zero, COMPLEX)
            sum_re += tl.where(last, more_re, 0.0).to(tl.float64)
            sum_im += tl.where(last, more_im, 0.0).to(tl.float64)
        _write(sums_ptr, chunk * count + lanes, mask, sum_re, sum_im, COMPLEX)
    if first_ptr is not None:
        re, im = _step(a_re, a_im, re, im, 0.0, 0.0, COMPLEX)
        _write(first_ptr, lanes, mask & last, re, im, COMPLEX)


@triton.jit
def _against(g_re, g_im, h_re, h_im, sum_re, sum_im, COMPLEX: tl.constexpr):
    """Σ + g h*."""
    if COMPLEX:
        re = sum_re + g_re * h_re + g_im * h_im
        im = sum_im + g_im * h_re - g_re * h_im
    else:
        re = sum_re + g_re * h_re
        im = re
    return re, im


@triton.jit(do_not_specialize=["rows", "cols"])
def linear_recurrence_sum_kernel(
    x_ptr,  # (rows, cols) float64
    out_ptr,  # (groups, cols)
    rows: tl.int64, cols: tl.int64,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ x over each group of STEPS · BLOCK_N rows; a complex number is two columns."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    group = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    for step in range(STEPS):
        row = (group * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (columns < cols)[None, :]
        total += tl.load(x_ptr + row[:, None] * cols + columns[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + group * cols + columns, sums, mask=columns < cols)


ends = Launcher(linear_recurrence_ends_kernel)
scan = Launcher(linear_recurrence_scan_kernel)
backward = Launcher(linear_recurrence_backward_kernel)
sum = Launcher(linear_recurrence_sum_kernel)
