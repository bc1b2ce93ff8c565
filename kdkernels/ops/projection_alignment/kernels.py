"""The kernels of projection alignment on GPUs, and what launches each; triton.py says what they are for."""
# mypy: allow-untyped-defs

from math import pi

import triton
import triton.language as tl

from kdkernels.launch import Launcher
from kdkernels.ops.projection_alignment.reference import ANGULAR_EPS, EPS

_EPS = tl.constexpr(EPS)
_EPS_SQUARED = tl.constexpr(EPS * EPS)
_ANGULAR_EPS = tl.constexpr(ANGULAR_EPS)
_PI = tl.constexpr(pi)


@triton.jit
def _load(ptr, bias_ptr, row_offsets, cols, cols_stride, bias_stride, row_mask, D):
    """(BLOCK_N, BLOCK_D) of a matrix plus its bias row, in float32; zeros beyond the last column."""
    in_row = cols < D
    offsets = row_offsets[:, None] + (cols.to(tl.int64) * cols_stride)[None, :]
    x = tl.load(ptr + offsets, mask=row_mask[:, None] & in_row[None, :], other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols.to(tl.int64) * bias_stride, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _store(ptr, row_offsets, cols, row_mask, D, counts, x):
    """Write (BLOCK_N, BLOCK_D) into a matrix with adjacent columns; rows that do not count become zero."""
    x = tl.where(counts[:, None], x, 0.0).to(ptr.dtype.element_ty)
    tl.store(ptr + row_offsets[:, None] + cols[None, :], x, mask=row_mask[:, None] & (cols < D)[None, :])


@triton.jit
def _weights(w_ptr, scale, rows, stride_w, row_mask):
    """Each row's weight times the scale, and whether the row exists at all."""
    w = tl.where(row_mask, 1.0, 0.0)
    if w_ptr is not None:
        w = tl.load(w_ptr + rows * stride_w, mask=row_mask, other=0.0)
    return w * scale, w != 0


@triton.jit
def _inverse_norm(square):
    """1/max(√square, EPS). Comparisons are written so that NaN stays NaN."""
    return tl.where(square < _EPS_SQUARED, 1.0 / _EPS, 1.0 / tl.sqrt_rn(square))


@triton.jit
def _loss_and_slope(h, negative, METRIC: tl.constexpr):
    """From h = 1 − |cos| and the sign of cos: the loss, and its derivative by 1 − cos."""
    if METRIC == "cosine":
        loss = tl.where(negative, 2.0 - h, h)
        slope = tl.where(h == h, 1.0, h)
    else:
        clamped = tl.where(h < _ANGULAR_EPS, _ANGULAR_EPS, h)
        # acos(1 − h) = 2 asin √(h/2) = π/2 − asin(1 − h): whichever has its argument in [0, ½]
        near = clamped < 0.5
        x = tl.where(near, tl.sqrt_rn(0.5 * clamped), 1.0 - clamped)
        z = x * x
        # asin(x)/x = 1 + z·P(z), minimax in float64: relative error 1.6e-8
        p = 0.04501131922006607 + z * (0.02649090439081192 + z * 0.038212571293115616)
        asin = x + x * z * (0.16666673123836517 + z * (0.07498805224895477 + z * p))
        angle = tl.where(near, 2.0 * asin, 0.5 * _PI - asin)
        loss = tl.where(negative, _PI - angle, angle)
        slope = tl.where(h < _ANGULAR_EPS, 0.0, 1.0 / tl.sqrt_rn(clamped * (2.0 - clamped)))
    return loss, slope


@triton.jit(do_not_specialize=["N", "scale"])
def projection_alignment_direct_kernel(
    z_s_ptr, z_t_ptr,  # (N, D), any strides
    bias_s_ptr, bias_t_ptr,  # (D,) or None
    w_ptr,  # (N,) or None
    losses_ptr,  # (N,)
    dz_s_ptr, dz_t_ptr,  # (N, D) or None; may be z_s, z_t themselves
    N: tl.int64,
    scale: tl.float32,  # of every weight
    stride_sn, stride_sd, stride_tn, stride_td, stride_bias_s, stride_bias_t, stride_w, stride_dsn, stride_dtn,
    D: tl.constexpr, METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    w, counts = _weights(w_ptr, scale, rows, stride_w, row_mask)
    s_rows, t_rows = rows * stride_sn, rows * stride_tn

    # mse is the same formula with lengths left as they are: e = z_s − z_t, |cos| = 1
    scale_s = tl.full((BLOCK_N,), 1.0, tl.float32)
    scale_t = tl.full((BLOCK_N,), 1.0, tl.float32)
    sign = tl.full((BLOCK_N,), 1.0, tl.float32)
    if METRIC != "mse":
        aa = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
        bb = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
        cc = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            z_s = _load(z_s_ptr, bias_s_ptr, s_rows, cols, stride_sd, stride_bias_s, row_mask, D)
            z_t = _load(z_t_ptr, bias_t_ptr, t_rows, cols, stride_td, stride_bias_t, row_mask, D)
            aa += z_s * z_s
            bb += z_s * z_t
            cc += z_t * z_t
        a, b, c = tl.sum(aa, 1), tl.sum(bb, 1), tl.sum(cc, 1)
        scale_s, scale_t = _inverse_norm(a), _inverse_norm(c)
        sign = tl.where(b < 0, -1.0, 1.0)

    ee = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        z_s = _load(z_s_ptr, bias_s_ptr, s_rows, cols, stride_sd, stride_bias_s, row_mask, D)
        z_t = _load(z_t_ptr, bias_t_ptr, t_rows, cols, stride_td, stride_bias_t, row_mask, D)
        e = z_s * scale_s[:, None] - z_t * (sign * scale_t)[:, None]
        ee += e * e
    ee = tl.sum(ee, 1)
    if METRIC == "mse":
        loss = ee / D
        slope = 2.0 * w / D
        cos_s = tl.full((BLOCK_N,), 1.0, tl.float32)
        cos_t = cos_s
    else:
        short_s, short_t = a < _EPS_SQUARED, c < _EPS_SQUARED
        cos = sign * b * scale_s * scale_t  # |cos|
        # far from ±1, and where the norm's clamp leaves vectors shorter than 1, cos itself is the better number
        plain = (cos < 0.5) | short_s | short_t
        h = tl.where(plain, 1.0 - cos, 0.5 * ee)
        cos = tl.where(plain, cos, 1.0 - h)
        loss, slope = _loss_and_slope(h, sign < 0, METRIC)
        slope *= w
        # a clamped norm has no gradient
        cos_s, cos_t = tl.where(short_s, 0.0, cos), tl.where(short_t, 0.0, cos)
    tl.store(losses_ptr + rows, tl.where(counts, w * loss, 0.0), mask=row_mask)

    if dz_s_ptr is not None or dz_t_ptr is not None:
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            z_s = _load(z_s_ptr, bias_s_ptr, s_rows, cols, stride_sd, stride_bias_s, row_mask, D)
            z_t = _load(z_t_ptr, bias_t_ptr, t_rows, cols, stride_td, stride_bias_t, row_mask, D)
            unit_s = z_s * scale_s[:, None]
            unit_t = z_t * (sign * scale_t)[:, None]
            if dz_s_ptr is not None:
                dz_s = (slope * sign * scale_s)[:, None] * (cos_s[:, None] * unit_s - unit_t)
                _store(dz_s_ptr, rows * stride_dsn, cols, row_mask, D, counts, dz_s)
            if dz_t_ptr is not None:
                dz_t = (slope * scale_t)[:, None] * (cos_t[:, None] * unit_t - unit_s)
                _store(dz_t_ptr, rows * stride_dtn, cols, row_mask, D, counts, dz_t)


@triton.jit(do_not_specialize=["N", "scale"])
def projection_alignment_gram_kernel(
    s_ptr, u_ptr, v_ptr,  # (N, K_s): points, s G_ss, t G_stᵀ
    t_ptr, c_ptr, x_ptr,  # (N, K_t): points, t G_tt, s G_st or None
    w_ptr,  # (N,) or None
    losses_ptr,  # (N,)
    ds_ptr, dt_ptr,  # (N, d_s), (N, d_t) or None: a bias adds a column to K, not to d
    N: tl.int64,
    scale: tl.float32,  # of every weight
    stride_sn, stride_sk, stride_tn, stride_tk, stride_w,
    K_s: tl.constexpr, K_t: tl.constexpr, d_s: tl.constexpr, d_t: tl.constexpr,
    SCALE_SS: tl.constexpr, SCALE_ST: tl.constexpr, SCALE_TT: tl.constexpr,  # u ← 2∂_a s, v ← ∂_b s, c ← 2∂_c t
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    w, counts = _weights(w_ptr, scale, rows, stride_w, row_mask)
    s_rows, t_rows = rows * stride_sn, rows * stride_tn

    aa = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    bb = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    cc = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    for start in range(0, K_s, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        s = _load(s_ptr, None, s_rows, cols, stride_sk, 0, row_mask, K_s)
        aa += s * _load(u_ptr, None, rows * K_s, cols, 1, 0, row_mask, K_s)
        bb += s * _load(v_ptr, None, rows * K_s, cols, 1, 0, row_mask, K_s)
    for start in range(0, K_t, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        t = _load(t_ptr, None, t_rows, cols, stride_tk, 0, row_mask, K_t)
        cc += t * _load(c_ptr, None, rows * K_t, cols, 1, 0, row_mask, K_t)
    a, b, c = tl.sum(aa, 1), tl.sum(bb, 1), tl.sum(cc, 1)
    scale_s, scale_t = _inverse_norm(a), _inverse_norm(c)
    cos = b * scale_s * scale_t
    loss, slope = _loss_and_slope(1.0 - tl.abs(cos), cos < 0, "cosine")
    tl.store(losses_ptr + rows, tl.where(counts, w * loss, 0.0), mask=row_mask)

    slope *= w
    by_b = -slope * scale_s * scale_t  # ∂_b
    # 2∂_a = −∂_b b/a keeps ⟨∂s, s⟩ = 0 to one rounding: near cos = ±1 all that is left is what u and v differ by
    by_a = tl.where(a < _EPS_SQUARED, 0.0, -by_b * (b / a))  # 2∂_a
    by_c = tl.where(c < _EPS_SQUARED, 0.0, -by_b * (b / c))  # 2∂_c
    if ds_ptr is not None or SCALE_SS or SCALE_ST:
        for start in range(0, K_s, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            if ds_ptr is not None:
                u = _load(u_ptr, None, rows * K_s, cols, 1, 0, row_mask, K_s)
                v = _load(v_ptr, None, rows * K_s, cols, 1, 0, row_mask, K_s)
                _store(ds_ptr, rows * d_s, cols, row_mask, d_s, counts, by_a[:, None] * u + by_b[:, None] * v)
            if SCALE_SS or SCALE_ST:
                s = _load(s_ptr, None, s_rows, cols, stride_sk, 0, row_mask, K_s)
                if SCALE_SS:
                    _store(u_ptr, rows * K_s, cols, row_mask, K_s, counts, by_a[:, None] * s)
                if SCALE_ST:
                    _store(v_ptr, rows * K_s, cols, row_mask, K_s, counts, by_b[:, None] * s)
    if dt_ptr is not None or SCALE_TT:
        for start in range(0, K_t, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            if dt_ptr is not None:
                x = _load(x_ptr, None, rows * K_t, cols, 1, 0, row_mask, K_t)
                y = _load(c_ptr, None, rows * K_t, cols, 1, 0, row_mask, K_t)
                _store(dt_ptr, rows * d_t, cols, row_mask, d_t, counts, by_b[:, None] * x + by_c[:, None] * y)
            if SCALE_TT:
                t = _load(t_ptr, None, t_rows, cols, stride_tk, 0, row_mask, K_t)
                _store(c_ptr, rows * K_t, cols, row_mask, K_t, counts, by_c[:, None] * t)


direct = Launcher(projection_alignment_direct_kernel)
gram = Launcher(projection_alignment_gram_kernel)
