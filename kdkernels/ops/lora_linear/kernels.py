"""The kernels of layers with adapters on GPUs, and what launches each; triton.py says what they are for.

One launch serves at most four siblings, whose operands stand as `m0 … m3`: Triton's launch path takes flat arguments
several times faster than tuples. Every operand but activations and weights is contiguous.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from kdkernels.launch import Launcher

MAX_SIBLINGS = 4  # that one launch serves
MAX_SUMS = 8

# The interpreter multiplies the bits of bfloat16 as integers.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _tile(ptr, rows, cols, stride_row, stride_col, row_count, col_count):
    """A tile of a matrix with any strides; zeros beyond its edges."""
    offsets = (rows.to(tl.int64) * stride_row)[:, None] + (cols.to(tl.int64) * stride_col)[None, :]
    return tl.load(ptr + offsets, mask=(rows < row_count)[:, None] & (cols < col_count)[None, :], other=0.0)


@triton.jit
def _put(ptr, rows, cols, stride_row, stride_col, row_count, col_count, x):
    """Write a tile of a matrix, but nothing beyond its edges."""
    offsets = (rows.to(tl.int64) * stride_row)[:, None] + (cols.to(tl.int64) * stride_col)[None, :]
    mask = (rows < row_count)[:, None] & (cols < col_count)[None, :]
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, in float32."""
    if a.dtype != b.dtype or a.dtype == tl.float32 or _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee" if is_hip() else PRECISION)


@triton.jit
def _masked(x, states_ptr, PLACE: tl.constexpr, threshold, rows, first_col):
    """mask ⊙ x for a tile, by kdkernels.philox.keep_mask: four words a block of columns, each used once."""
    if PLACE >= 0:
        seed, offset = tl.load(states_ptr + 2 * PLACE), tl.load(states_ptr + 2 * PLACE + 1)
        block = (first_col // 4 + tl.arange(0, x.shape[1] // 4)).to(tl.uint32)[None, :]
        low, high = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, block, rows.to(tl.uint32)[:, None], low, high)
        least = tl.full((1, 1), threshold, tl.uint32)
        keep = tl.interleave(tl.interleave(w0 >= least, w2 >= least), tl.interleave(w1 >= least, w3 >= least))
        x = tl.where(keep, x, 0.0)
    return x


SCALARS = ["N", *(f"{name}{k}" for k in range(MAX_SIBLINGS) for name in ("threshold", "scale"))]


@triton.jit(do_not_specialize=SCALARS)
def lora_linear_project_kernel(
    x_ptr,  # (N, D), any strides
    m0_ptr, m1_ptr, m2_ptr, m3_ptr,  # of each sibling: (r, D), or (D, r) where TRANSPOSED
    out0_ptr, out1_ptr, out2_ptr, out3_ptr,  # (N, r) float32
    states_ptr,  # (all siblings, 2), or None
    N: tl.int64,
    threshold0: tl.uint32, threshold1: tl.uint32, threshold2: tl.uint32, threshold3: tl.uint32,
    scale0: tl.float32, scale1: tl.float32, scale2: tl.float32, scale3: tl.float32,
    stride_xn, stride_xd,
    K: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,  # 0 beyond K siblings
    PLACE0: tl.constexpr, PLACE1: tl.constexpr, PLACE2: tl.constexpr, PLACE3: tl.constexpr,  # in states; -1: no mask
    D: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = scale (mask ⊙ x) mᵀ for every sibling; a program takes BLOCK_N points and BLOCK_R ranks."""
    m_ptrs, out_ptrs = (m0_ptr, m1_ptr, m2_ptr, m3_ptr), (out0_ptr, out1_ptr, out2_ptr, out3_ptr)
    thresholds, scales = (threshold0, threshold1, threshold2, threshold3), (scale0, scale1, scale2, scale3)
    RANKS: tl.constexpr = (R0, R1, R2, R3)
    PLACES: tl.constexpr = (PLACE0, PLACE1, PLACE2, PLACE3)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    totals: tl.tuple = ()
    for _ in tl.static_range(K):
        totals += (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        x = _tile(x_ptr, rows, cols, stride_xn, stride_xd, N, D)
        sums: tl.tuple = ()
        for k in tl.static_range(K):
            kept = _masked(x, states_ptr, PLACES[k], thresholds[k], rows, start)
            if TRANSPOSED:
                m = _tile(m_ptrs[k], cols, ranks, RANKS[k], 1, D, RANKS[k])
            else:
                m = _tile(m_ptrs[k], cols, ranks, 1, D, D, RANKS[k])
            sums += (_dot(kept, m, totals[k], PRECISION),)
        totals = sums
    for k in tl.static_range(K):
        _put(out_ptrs[k], rows, ranks, RANKS[k], 1, N, RANKS[k], totals[k] * scales[k])


@triton.jit(do_not_specialize=SCALARS)
def lora_linear_reduce_kernel(
    x_ptr,  # (N, D), any strides
    m0_ptr, m1_ptr, m2_ptr, m3_ptr,  # of each sibling: (N, r) float32
    out0_ptr, out1_ptr, out2_ptr, out3_ptr,  # (chunks, r, D), or (chunks, D, r) where TRANSPOSED
    states_ptr,  # (all siblings, 2), or None
    N: tl.int64,
    threshold0: tl.uint32, threshold1: tl.uint32, threshold2: tl.uint32, threshold3: tl.uint32,
    scale0: tl.float32, scale1: tl.float32, scale2: tl.float32, scale3: tl.float32,
    stride_xn, stride_xd,
    K: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,  # 0 beyond K siblings
    PLACE0: tl.constexpr, PLACE1: tl.constexpr, PLACE2: tl.constexpr, PLACE3: tl.constexpr,  # in states; -1: no mask
    D: tl.constexpr, TRANSPOSED: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = scale mᵀ (mask ⊙ x) over each chunk of STEPS · BLOCK_N points; a program takes BLOCK_D columns of one."""
    m_ptrs, out_ptrs = (m0_ptr, m1_ptr, m2_ptr, m3_ptr), (out0_ptr, out1_ptr, out2_ptr, out3_ptr)
    thresholds, scales = (threshold0, threshold1, threshold2, threshold3), (scale0, scale1, scale2, scale3)
    RANKS: tl.constexpr = (R0, R1, R2, R3)
    PLACES: tl.constexpr = (PLACE0, PLACE1, PLACE2, PLACE3)
    chunk = tl.program_id(0).to(tl.int64)
    first_col = tl.program_id(1) * BLOCK_D
    cols = first_col + tl.arange(0, BLOCK_D)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    totals: tl.tuple = ()
    for _ in tl.static_range(K):
        totals += (tl.zeros((BLOCK_R, BLOCK_D), tl.float32),)
    for step in range(STEPS):
        rows = (chunk * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        x = _tile(x_ptr, rows, cols, stride_xn, stride_xd, N, D)
        sums: tl.tuple = ()
        for k in tl.static_range(K):
            kept = _masked(x, states_ptr, PLACES[k], thresholds[k], rows, first_col)
            m = _tile(m_ptrs[k], ranks, rows, 1, RANKS[k], RANKS[k], N)
            sums += (_dot(m, kept, totals[k], PRECISION),)
        totals = sums
    for k in tl.static_range(K):
        out_ptr = out_ptrs[k] + chunk * (RANKS[k] * D)
        if TRANSPOSED:
            _put(out_ptr, ranks, cols, 1, RANKS[k], RANKS[k], D, totals[k] * scales[k])
        else:
            _put(out_ptr, ranks, cols, D, 1, RANKS[k], D, totals[k] * scales[k])


@triton.jit(do_not_specialize=["N", "scale"])
def lora_linear_adapter_kernel(
    dy_ptr,  # (N, D), any strides
    b_ptr,  # (D, r)
    s_ptr,  # (N, r) float32
    ds_ptr,  # (bands, N, r) float32
    db_ptr,  # (blocks of points, D, r)
    N: tl.int64, scale: tl.float32,
    stride_yn, stride_yd,
    D: tl.constexpr, RANK: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr,
    DS_PRECISION: tl.constexpr, DB_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ds = scale dy b over each band of STEPS · BLOCK_D columns, db = scale dyᵀ s over each block of points."""
    block, band = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    s = _tile(s_ptr, rows, ranks, RANK, 1, N, RANK) * scale
    ds = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for step in range(STEPS):
        cols = (band * STEPS + step) * BLOCK_D + tl.arange(0, BLOCK_D)
        dy = _tile(dy_ptr, rows, cols, stride_yn, stride_yd, N, D)
        b = _tile(b_ptr, cols, ranks, RANK, 1, D, RANK)
        ds = _dot(dy, b, ds, DS_PRECISION)
        db = _dot(tl.trans(dy), s, tl.zeros((BLOCK_D, BLOCK_R), tl.float32), DB_PRECISION)
        _put(db_ptr + block * D * RANK, cols, ranks, RANK, 1, D, RANK, db)
    _put(ds_ptr + band * N * RANK, rows, ranks, RANK, 1, N, RANK, ds * scale)


@triton.jit(do_not_specialize=SCALARS)
def lora_linear_expand_kernel(
    x_ptr,  # (N, WIDTH) to be multiplied by w; without w it is the base itself: (N, D). Any strides
    w_ptr,  # (D, WIDTH), any strides, or None
    bias_ptr,  # (D,) or None
    p0_ptr, p1_ptr, p2_ptr, p3_ptr,  # of each sibling: (N, r) float32
    q0_ptr, q1_ptr, q2_ptr, q3_ptr,  # (r, D), or (D, r) where TRANSPOSED
    out_ptr,  # (N, D); may be the base
    states_ptr,  # (all siblings, 2), or None, as it is beside w
    N: tl.int64,
    threshold0: tl.uint32, threshold1: tl.uint32, threshold2: tl.uint32, threshold3: tl.uint32,
    scale0: tl.float32, scale1: tl.float32, scale2: tl.float32, scale3: tl.float32,
    stride_xn, stride_xk, stride_wd, stride_wk,
    K: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,  # 0 beyond K siblings
    PLACE0: tl.constexpr, PLACE1: tl.constexpr, PLACE2: tl.constexpr, PLACE3: tl.constexpr,  # in states; -1: no mask
    WIDTH: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = x wᵀ + bias + Σ mask ⊙ (scale p q). Neighbours share their points, which stay in the cache as w does."""
    p_ptrs, q_ptrs = (p0_ptr, p1_ptr, p2_ptr, p3_ptr), (q0_ptr, q1_ptr, q2_ptr, q3_ptr)
    thresholds, scales = (threshold0, threshold1, threshold2, threshold3), (scale0, scale1, scale2, scale3)
    RANKS: tl.constexpr = (R0, R1, R2, R3)
    PLACES: tl.constexpr = (PLACE0, PLACE1, PLACE2, PLACE3)
    bands = tl.cdiv(D, BLOCK_D)
    rows = (tl.program_id(0) // bands).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_col = tl.program_id(0) % bands * BLOCK_D
    cols = first_col + tl.arange(0, BLOCK_D)
    if w_ptr is None:
        total = _tile(x_ptr, rows, cols, stride_xn, stride_xk, N, D).to(tl.float32)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x = _tile(x_ptr, rows, inner, stride_xn, stride_xk, N, WIDTH)
            total = _dot(x, _tile(w_ptr, inner, cols, stride_wk, stride_wd, WIDTH, D), total, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        added = tl.zeros((BLOCK_N, BLOCK_D), tl.float32) if w_ptr is None else total
        for start in range(0, RANKS[k], BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            p = _tile(p_ptrs[k], rows, ranks, RANKS[k], 1, N, RANKS[k]) * scales[k]
            if TRANSPOSED:
                q = _tile(q_ptrs[k], ranks, cols, 1, RANKS[k], RANKS[k], D)
            else:
                q = _tile(q_ptrs[k], ranks, cols, D, 1, RANKS[k], D)
            added = _dot(p, q, added, PRECISION)
        if w_ptr is None:
            added = total + _masked(added, states_ptr, PLACES[k], thresholds[k], rows, first_col)
        total = added
    _put(out_ptr, rows, cols, D, 1, N, D, total)


SUMS = [f"{name}{k}" for name in ("count", "size") for k in range(MAX_SUMS)]


@triton.jit(do_not_specialize=SUMS)
def lora_linear_sum_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr,  # (count, size) float32
    out0_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr, out5_ptr, out6_ptr, out7_ptr,  # (size,)
    count0: tl.int64, count1: tl.int64, count2: tl.int64, count3: tl.int64,
    count4: tl.int64, count5: tl.int64, count6: tl.int64, count7: tl.int64,
    size0: tl.int64, size1: tl.int64, size2: tl.int64, size3: tl.int64,
    size4: tl.int64, size5: tl.int64, size6: tl.int64, size7: tl.int64,
    SUMS: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = Σ x over its first dimension, at most STEPS · BLOCK_N, for several at once: each is one row of programs."""
    x_ptrs = (x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr)
    out_ptrs = (out0_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr, out5_ptr, out6_ptr, out7_ptr)
    counts = (count0, count1, count2, count3, count4, count5, count6, count7)
    sizes = (size0, size1, size2, size3, size4, size5, size6, size7)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    for k in tl.static_range(SUMS):
        if tl.program_id(1) == k:
            total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for step in range(STEPS):
                rows = step * BLOCK_N + tl.arange(0, BLOCK_N)
                total += _tile(x_ptrs[k], rows, cols, sizes[k], 1, counts[k], sizes[k])
            x = tl.sum(total, 0).to(out_ptrs[k].dtype.element_ty)
            tl.store(out_ptrs[k] + cols, x, mask=cols < sizes[k])


project = Launcher(lora_linear_project_kernel)
reduce = Launcher(lora_linear_reduce_kernel)
adapter = Launcher(lora_linear_adapter_kernel)
expand = Launcher(lora_linear_expand_kernel)
sum = Launcher(lora_linear_sum_kernel)
