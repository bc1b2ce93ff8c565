"""Projection alignment on GPUs: the matmuls are cuBLAS's or rocBLAS's, everything between them is one Triton kernel.

With unit vectors ẑ_s, ẑ_t and σ = sign⟨ẑ_s, ẑ_t⟩, the short difference e = ẑ_s − σẑ_t tells both angles; near
cos = ±1 it keeps the digits that 1 − cos loses:

    h = 1 − |cos| = ½‖e‖²      cosine: h or 2 − h      angular: acos(1 − h) or π − acos(1 − h)
    ∂cosine/∂z_s = (cos ẑ_s − ẑ_t)/‖z_s‖      ∂cosine/∂z_t = (cos ẑ_t − ẑ_s)/‖z_t‖      angular: times 1/√(h(2 − h))

    direct   per block of rows: z = x Wᵀ (matmul) | `projection_alignment_direct_kernel`: z -> losses, ∂z |
             ∂x = ∂z W, ∂W += ∂zᵀ x (matmuls)
    gram     per block of rows: u = s G_ss, v = t G_stᵀ, c = t G_tt (matmuls) | `projection_alignment_gram_kernel`:
             u, v, c -> losses, ∂s, ∂t, scaled rows | M += scaled rowsᵀ rows (matmuls); at the end ∂W = W M

A block's buffers are reused, so memory is O(block · D). Sums are float32, in a fixed order, without atomics; nothing
waits for the device. gram serves cosine in float32 (`method.gram_cost` says why). Near cos = ±1 what it leaves of ∂s
and ∂W are the last digits of s G and W M, so G, M and W M are summed in float64, which GPUs for data centres do at the
rate of float32.
"""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.ops.projection_alignment import method as methods
from kdkernels.ops.projection_alignment.reference import ANGULAR_EPS, EPS

Operands = Sequence[Tensor | None]

BLOCK_BYTES = 256 * 2**20  # of buffers: enough rows to keep a large GPU's matmuls busy
MIN_ROWS = 128


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts (rows, columns). At least 4 elements a thread: no element belongs to two threads, so rows may
    be overwritten in place."""

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int


TILES = (Tile(16, 64, 4), Tile(4, 256, 4), Tile(1, 1024, 4), Tile(1, 2048, 8))


def tile_for(D: int) -> Tile:
    """The narrowest tile that takes a row of D columns in one step; beyond the widest, rows take several."""
    return next((tile for tile in TILES if D <= tile.BLOCK_D), TILES[-1])


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


@triton.jit
def projection_alignment_direct_kernel(
    z_s_ptr, z_t_ptr,  # (N, D), any strides
    bias_s_ptr, bias_t_ptr,  # (D,) or None
    w_ptr,  # (N,) or None
    scale,  # of every weight
    losses_ptr,  # (N,)
    dz_s_ptr, dz_t_ptr,  # (N, D) or None; may be z_s, z_t themselves
    N,
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


@triton.jit
def projection_alignment_gram_kernel(
    s_ptr, u_ptr, v_ptr,  # (N, K_s): points, s G_ss, t G_stᵀ
    t_ptr, c_ptr, x_ptr,  # (N, K_t): points, t G_tt, s G_st or None
    w_ptr,  # (N,) or None
    scale,  # of every weight
    losses_ptr,  # (N,)
    ds_ptr, dt_ptr,  # (N, d_s), (N, d_t) or None: a bias adds a column to K, not to d
    N,
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


def loss_and_gradients(
    operands: Operands,
    weights: Tensor | None,
    metric: str,
    method: str,
    divisor: int,
    total: Tensor,
    grads: Sequence[Tensor | None],
) -> None:
    """Fill `total` with Σ_i weights_i · loss_i / divisor and each tensor of `grads` with its gradient."""
    student = operands[0]
    assert student is not None
    losses = student.new_empty(student.shape[0], dtype=torch.float32)
    wanted = [g if g is not None and g.numel() else None for g in grads]
    _run(operands, weights, metric, method, 1 / divisor, losses, wanted)
    torch.sum(losses, 0, out=total)


def losses(operands: Operands, weights: Tensor | None, metric: str, method: str, losses: Tensor) -> None:
    """Fill `losses` (N,) with weights_i · loss_i."""
    _run(operands, weights, metric, method, 1.0, losses, [None] * 6)


def _run(
    operands: Operands,
    weights: Tensor | None,
    metric: str,
    method: str,
    scale: float,
    losses: Tensor,
    grads: Operands,
) -> None:
    sizes = methods.sizes(operands, [g is not None for g in grads], "triton", metric)
    run = _gram if methods.choose(method, sizes)[0] == "gram" else _direct
    # the operands' dtypes were settled before: autocast must not round the float32 matmuls in here
    with torch.cuda.device_of(losses), torch.autocast(losses.device.type, enabled=False):
        run(operands, weights, metric, scale, losses, grads)


class _Side:
    """One side of the direct method: its operands, and the buffers that a block of its rows passes through."""

    def __init__(self, operands: Operands, grads: Operands) -> None:
        x, proj, self.bias = operands
        assert x is not None
        self.x = x  # (N, d)
        self.grad_x, self.grad_proj, self.grad_bias = grads
        self.needs_dz = any(g is not None for g in grads)
        self.D = x.shape[1] if proj is None else proj.shape[0]
        self.dtype = x.dtype if proj is None or proj.dtype is x.dtype else torch.float32  # of its matmuls' operands
        self.proj = None if proj is None else proj.to(self.dtype)  # (D, d)
        self.sum_proj = _accumulator(self.grad_proj)
        self.sum_bias = _accumulator(self.grad_bias)

    @property
    def row_bytes(self) -> int:
        """Bytes of buffers for one row."""
        return 0 if self.proj is None else self.D * (4 + self.needs_dz * (self.dtype is not torch.float32) * 2)

    def allocate(self, rows: int) -> None:
        if self.proj is not None:
            self.z_rows = self.x.new_empty((rows, self.D), dtype=torch.float32)
            in_place = self.dtype is torch.float32 or not self.needs_dz
            self.dz_rows = self.z_rows if in_place else self.x.new_empty((rows, self.D), dtype=self.dtype)

    def project(self, block: slice, w: Tensor | None) -> None:
        """The block's z = x Wᵀ (the kernel adds the bias), and the room for ∂z."""
        x = self.x[block]
        if self.proj is None:
            self.z, self.dz = x, None if self.grad_x is None else self.grad_x[block]
            return
        if self.sum_proj is not None:
            x = _masked(x, w)
        self.x_rows = x.to(self.dtype)
        self.z = self.z_rows[: len(x)]
        self.dz = self.dz_rows[: len(x)] if self.needs_dz else None
        _mm(self.x_rows, self.proj.T, out=self.z)

    def differentiate(self, block: slice) -> None:
        """∂x = ∂z W, ∂W += ∂zᵀ x, ∂bias += Σ ∂z."""
        if self.proj is None or self.dz is None:
            return
        if self.grad_x is not None:
            if self.grad_x.dtype is self.dtype:
                torch.mm(self.dz, self.proj, out=self.grad_x[block])
            else:
                self.grad_x[block] = torch.mm(self.dz, self.proj)
        if self.sum_proj is not None:
            _accumulate(self.sum_proj, self.dz.T, self.x_rows)
        if self.sum_bias is not None:
            self.sum_bias += self.dz.sum(0, dtype=torch.float32)

    def finish(self) -> None:
        for grad, total in ((self.grad_proj, self.sum_proj), (self.grad_bias, self.sum_bias)):
            if grad is not None and total is not None and total is not grad:
                grad.copy_(total)


def _direct(
    operands: Operands, weights: Tensor | None, metric: str, scale: float, losses: Tensor, grads: Operands
) -> None:
    s, t = _Side(operands[0::2], grads[0::2]), _Side(operands[1::2], grads[1::2])
    N = losses.shape[0]
    rows = _rows_per_block(N, s.row_bytes + t.row_bytes)
    s.allocate(rows)
    t.allocate(rows)
    tile = tile_for(s.D)
    for start in range(0, N, rows):
        block = slice(start, min(start + rows, N))
        w = None if weights is None else weights[block]
        s.project(block, w)
        t.project(block, w)
        projection_alignment_direct_kernel[(triton.cdiv(len(s.z), tile.BLOCK_N),)](
            s.z, t.z, s.bias, t.bias, w, scale, losses[block], s.dz, t.dz, len(s.z),
            *s.z.stride(), *t.z.stride(), _stride(s.bias), _stride(t.bias), _stride(w), _stride(s.dz), _stride(t.dz),
            D=s.D, METRIC=metric, BLOCK_N=tile.BLOCK_N, BLOCK_D=tile.BLOCK_D, num_warps=tile.num_warps,
        )  # fmt: skip
        s.differentiate(block)
        t.differentiate(block)
    s.finish()
    t.finish()


def _gram(
    operands: Operands, weights: Tensor | None, metric: str, scale: float, losses: Tensor, grads: Operands
) -> None:
    s, W_s, bias_s = operands[0::2]
    t, W_t, bias_t = operands[1::2]
    grad_s, grad_W_s, grad_bias_s = grads[0::2]
    grad_t, grad_W_t, grad_bias_t = grads[1::2]
    assert s is not None and t is not None and W_s is not None and W_t is not None
    W_s, W_t = _with_bias(W_s, bias_s), _with_bias(W_t, bias_t)  # (D, K_s), (D, K_t)
    G_ss, G_st, G_tt = _inner(W_s, W_s), _inner(W_s, W_t), _inner(W_t, W_t)
    K_s, K_t = G_st.shape
    needs_s = grad_W_s is not None or grad_bias_s is not None
    needs_t = grad_W_t is not None or grad_bias_t is not None
    M_ss = W_s.new_zeros((K_s, K_s), dtype=torch.float64) if needs_s else None
    M_st = W_s.new_zeros((K_s, K_t), dtype=torch.float64) if needs_s or needs_t else None
    M_tt = W_s.new_zeros((K_t, K_t), dtype=torch.float64) if needs_t else None

    N = losses.shape[0]
    rows = _rows_per_block(N, 12 * (K_s + K_t))
    tile = tile_for(max(K_s, K_t))
    for start in range(0, N, rows):
        block = slice(start, min(start + rows, N))
        w = None if weights is None else weights[block]
        s_block = _points(s[block], bias_s, w if M_st is not None else None)  # (n, K_s)
        t_block = _points(t[block], bias_t, w if M_st is not None else None)  # (n, K_t)
        n = len(s_block)
        u = s_block @ G_ss  # (n, K_s)
        v = t_block @ G_st.T  # (n, K_s)
        c = t_block @ G_tt  # (n, K_t)
        x = None if grad_t is None else s_block @ G_st  # (n, K_t)
        projection_alignment_gram_kernel[(triton.cdiv(n, tile.BLOCK_N),)](
            s_block, u, v, t_block, c, x, w, scale, losses[block],
            None if grad_s is None else grad_s[block], None if grad_t is None else grad_t[block],
            n, *s_block.stride(), *t_block.stride(), _stride(w),
            K_s=K_s, K_t=K_t, d_s=s.shape[1], d_t=t.shape[1],
            SCALE_SS=M_ss is not None, SCALE_ST=M_st is not None, SCALE_TT=M_tt is not None,
            BLOCK_N=tile.BLOCK_N, BLOCK_D=tile.BLOCK_D, num_warps=tile.num_warps,
        )  # fmt: skip
        for M, scaled, points in ((M_ss, u, s_block), (M_st, v, t_block), (M_tt, c, t_block)):
            if M is not None:
                M.addmm_(scaled.T.double(), points.double())

    for M_own, M_other, W, other, grad_W, grad_bias in (
        (M_ss, None if M_st is None else M_st.T, W_s, W_t, grad_W_s, grad_bias_s),
        (M_tt, M_st, W_t, W_s, grad_W_t, grad_bias_t),
    ):
        if M_own is not None and M_other is not None:
            _split(torch.addmm(W.double() @ M_own, other.double(), M_other), grad_W, grad_bias)


def _rows_per_block(N: int, row_bytes: int) -> int:
    """Rows whose buffers fit BLOCK_BYTES, a multiple of MIN_ROWS; all rows where there are no buffers."""
    fitting = N if row_bytes == 0 else BLOCK_BYTES // row_bytes // MIN_ROWS * MIN_ROWS
    return max(1, min(N, max(fitting, MIN_ROWS)))


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _masked(x: Tensor, w: Tensor | None) -> Tensor:
    """(n, d) with zeros in the rows that do not count: what they hold must not meet a zero in a matmul."""
    return x if w is None else x.masked_fill((w == 0)[:, None], 0)


def _points(x: Tensor, bias: Tensor | None, w: Tensor | None) -> Tensor:
    """(n, d) rows of the gram method in float32, with a column of ones where there is a bias."""
    x = _masked(x, w).to(torch.float32)
    return x if bias is None else torch.cat([x, x.new_ones((len(x), 1))], 1)


def _with_bias(W: Tensor, bias: Tensor | None) -> Tensor:
    """(D, d) or, with the bias as its last column, (D, d + 1), in float32."""
    W = W.to(torch.float32)
    return W if bias is None else torch.cat([W, bias.to(torch.float32)[:, None]], 1)


def _inner(A: Tensor, B: Tensor) -> Tensor:
    """AᵀB in float32, summed in float64."""
    return (A.double().T @ B.double()).float()


def _split(dW: Tensor, grad_W: Tensor | None, grad_bias: Tensor | None) -> None:
    """The inverse of `_with_bias` on gradients."""
    if grad_W is not None:
        grad_W.copy_(dW[:, : grad_W.shape[1]])
    if grad_bias is not None:
        grad_bias.copy_(dW[:, -1])


def _accumulator(grad: Tensor | None) -> Tensor | None:
    """Float32 zeros in the shape of a gradient: the gradient itself where it is float32."""
    if grad is None:
        return None
    return grad.zero_() if grad.dtype is torch.float32 else torch.zeros_like(grad, dtype=torch.float32)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b in float32, whatever the (common) dtype of a and b."""
    if a.dtype is torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # only GPUs have matmuls with mixed dtypes
        torch.mm(a.float(), b.float(), out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in float32, whatever the (common) dtype of a and b."""
    if a.dtype is torch.float32:
        total.addmm_(a, b)
    else:  # addmm with a float32 sum of low-precision products is newer than mm with one
        product = torch.empty_like(total)
        _mm(a, b, out=product)
        total += product
