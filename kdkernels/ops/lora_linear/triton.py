"""The low-rank adapter on GPUs: the base layer's matmuls are cuBLAS's or rocBLAS's, the rest is Triton.

    S = x̂ Aᵀ         `lora_linear_project_kernel`   x is read once for all siblings
    Y = x Wᵀ + b + α S Bᵀ
                     `lora_linear_expand_kernel`    as `fuses` decides: a matmul with the adapter in its accumulators,
                                                    or a pass over cuBLAS's x Wᵀ, which is rounded once more
    dS = α dY B, dB = α dYᵀ S
                     `lora_linear_adapter_kernel`   one pass over dY; at high ranks project and reduce, a pass each
    dA = dSᵀ x̂       `lora_linear_reduce_kernel`    x is read once for all siblings
    dX = Σ dY W + mask ⊙ dS A / (1 − p)
                     `lora_linear_expand_kernel`    a pass over cuBLAS's Σ dY W, for all siblings

Masks are drawn in the kernels (kdkernels.philox), from states that stay on the device: nothing waits for it. Sums are
float32, in an order that depends on the shapes alone, without atomics: sums over points are first of chunks, then of
the chunks' results.

Precision: two operands of the same 16-bit dtype meet as they are. Otherwise both are widened to float32 in registers,
and multiplied as float32 matmuls are (`torch.set_float32_matmul_precision`) where the result is float32: with float32
adapters beside a bfloat16 base too, since their gradients keep those digits, and eager's do. Where the result has 16
bits, tf32 is enough: it holds every bit of the 16-bit operand and as many of S and dS as float16 has, which is what
eager rounds them to. AMD's matrix units multiply float32 as it is.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from kdkernels.ops.lora_linear.call import unpack
from kdkernels.philox import threshold

MAX_RANK = 64  # columns of adapters whose sums one program holds; more are cut
RANK_STEP = 32  # columns of S that meet B, or of dS that meet A, at a time
MAX_SIBLINGS = 4  # that one kernel serves
LOSS = 0.5  # of Triton's matmul against cuBLAS's, as a share of its time
PROGRAMS = 512  # enough to fill a large GPU: sums over points are cut until there are as many


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts (points, features); a matmul cuts d_in four times as fine."""

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# On NVIDIA "ieee" multiplies without matrix units, each operand in registers: smaller tiles.
PROJECT = {"ieee": Tile(32, 32, 4, 2), "tf32": Tile(64, 64, 4, 3)}
REDUCE = {"ieee": Tile(32, 64, 4, 2), "tf32": Tile(32, 128, 4, 3)}
ADAPTER = {"ieee": Tile(128, 32, 8, 2), "tf32": Tile(128, 64, 8, 2)}
EXPAND = {"ieee": Tile(32, 64, 4, 2), "tf32": Tile(64, 64, 4, 2)}
FUSED = {"ieee": Tile(64, 64, 4, 2), "tf32": Tile(64, 128, 4, 3)}


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
def _masked(x, state_ptr, threshold, rows, first_col):
    """mask ⊙ x for a tile, by kdkernels.philox.keep_mask: four words a block of columns, each used once."""
    if state_ptr is not None:
        seed, offset = tl.load(state_ptr), tl.load(state_ptr + 1)
        block = (first_col // 4 + tl.arange(0, x.shape[1] // 4)).to(tl.uint32)[None, :]
        low, high = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, block, rows.to(tl.uint32)[:, None], low, high)
        least = tl.full((1, 1), threshold, tl.uint32)
        keep = tl.interleave(tl.interleave(w0 >= least, w2 >= least), tl.interleave(w1 >= least, w3 >= least))
        x = tl.where(keep, x, 0.0)
    return x


@triton.jit
def lora_linear_project_kernel(
    x_ptr,  # (N, D), any strides
    m_ptrs,  # of each part: (r, D), any strides
    out_ptrs,  # (N, r) float32
    state_ptrs, thresholds,  # its mask, or None
    scales,
    N, stride_xn, stride_xd, M_STRIDES: tl.constexpr, OUT_STRIDES: tl.constexpr,
    D: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = scale (mask ⊙ x) mᵀ for every part; a program takes BLOCK_N points."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    totals: tl.tuple = ()
    for _ in tl.static_range(len(m_ptrs)):
        totals += (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        x = _tile(x_ptr, rows, cols, stride_xn, stride_xd, N, D)
        sums: tl.tuple = ()
        for k in tl.static_range(len(m_ptrs)):
            kept = _masked(x, state_ptrs[k], thresholds[k], rows, start)
            m = _tile(m_ptrs[k], cols, ranks, M_STRIDES[k][1], M_STRIDES[k][0], D, RANKS[k])
            sums += (_dot(kept, m, totals[k], PRECISION),)
        totals = sums
    for k in tl.static_range(len(m_ptrs)):
        _put(out_ptrs[k], rows, ranks, OUT_STRIDES[k][0], 1, N, RANKS[k], totals[k] * scales[k])


@triton.jit
def lora_linear_reduce_kernel(
    x_ptr,  # (N, D), any strides
    m_ptrs,  # of each part: (N, r) float32
    out_ptrs,  # (chunks, r, D), any strides
    state_ptrs, thresholds,  # its mask, or None
    scales,
    N, stride_xn, stride_xd, M_STRIDES: tl.constexpr, OUT_STRIDES: tl.constexpr,
    D: tl.constexpr, RANKS: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = scale mᵀ (mask ⊙ x) over each chunk of STEPS · BLOCK_N points; a program takes BLOCK_D columns of one."""
    chunk = tl.program_id(0).to(tl.int64)
    first_col = tl.program_id(1) * BLOCK_D
    cols = first_col + tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, BLOCK_R)
    totals: tl.tuple = ()
    for _ in tl.static_range(len(m_ptrs)):
        totals += (tl.zeros((BLOCK_R, BLOCK_D), tl.float32),)
    for step in range(STEPS):
        rows = (chunk * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        x = _tile(x_ptr, rows, cols, stride_xn, stride_xd, N, D)
        sums: tl.tuple = ()
        for k in tl.static_range(len(m_ptrs)):
            kept = _masked(x, state_ptrs[k], thresholds[k], rows, first_col)
            m = _tile(m_ptrs[k], ranks, rows, 1, M_STRIDES[k][0], RANKS[k], N)
            sums += (_dot(m, kept, totals[k], PRECISION),)
        totals = sums
    for k in tl.static_range(len(m_ptrs)):
        out_ptr = out_ptrs[k] + chunk * OUT_STRIDES[k][0]
        _put(out_ptr, ranks, cols, OUT_STRIDES[k][1], OUT_STRIDES[k][2], RANKS[k], D, totals[k] * scales[k])


@triton.jit
def lora_linear_adapter_kernel(
    dy_ptr,  # (N, D), any strides
    b_ptr,  # (D, r), any strides
    s_ptr,  # (N, r) float32
    ds_ptr,  # (bands, N, r) float32
    db_ptr,  # (blocks of points, D, r)
    scale,
    N, stride_yn, stride_yd, B_STRIDES: tl.constexpr, S_STRIDE: tl.constexpr,
    D: tl.constexpr, RANK: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr,
    DS_PRECISION: tl.constexpr, DB_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ds = scale dy b over each band of STEPS · BLOCK_D columns, db = scale dyᵀ s over each block of points."""
    block, band = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    s = _tile(s_ptr, rows, ranks, S_STRIDE, 1, N, RANK) * scale
    ds = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for step in range(STEPS):
        cols = (band * STEPS + step) * BLOCK_D + tl.arange(0, BLOCK_D)
        dy = _tile(dy_ptr, rows, cols, stride_yn, stride_yd, N, D)
        b = _tile(b_ptr, cols, ranks, B_STRIDES[0], B_STRIDES[1], D, RANK)
        ds = _dot(dy, b, ds, DS_PRECISION)
        db = _dot(tl.trans(dy), s, tl.zeros((BLOCK_D, BLOCK_R), tl.float32), DB_PRECISION)
        _put(db_ptr + block * D * RANK, cols, ranks, RANK, 1, D, RANK, db)
    _put(ds_ptr + band * N * RANK, rows, ranks, RANK, 1, N, RANK, ds * scale)


@triton.jit
def lora_linear_expand_kernel(
    x_ptr,  # (N, K) to be multiplied by w; without w it is the base itself: (N, D). Any strides
    w_ptr,  # (D, K), any strides, or None
    bias_ptr,  # (D,) or None
    p_ptrs, q_ptrs,  # of each sibling: (N, r) float32 and (r, D), any strides
    out_ptr,  # (N, D), adjacent columns; may be the base
    state_ptrs, thresholds,  # its mask, or None, as it is beside w
    scales,
    N, stride_xn, stride_xk, stride_wd, stride_wk, stride_bias, P_STRIDES: tl.constexpr, Q_STRIDES: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = x wᵀ + bias + Σ mask ⊙ (scale p q). Neighbours share their points, which stay in the cache as w does."""
    bands = tl.cdiv(D, BLOCK_D)
    rows = (tl.program_id(0) // bands).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_col = tl.program_id(0) % bands * BLOCK_D
    cols = first_col + tl.arange(0, BLOCK_D)
    if w_ptr is None:
        total = _tile(x_ptr, rows, cols, stride_xn, stride_xk, N, D).to(tl.float32)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, K, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x = _tile(x_ptr, rows, inner, stride_xn, stride_xk, N, K)
            total = _dot(x, _tile(w_ptr, inner, cols, stride_wk, stride_wd, K, D), total, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + cols.to(tl.int64) * stride_bias, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(len(p_ptrs)):
        added = tl.zeros((BLOCK_N, BLOCK_D), tl.float32) if w_ptr is None else total
        for start in range(0, RANKS[k], BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            p = _tile(p_ptrs[k], rows, ranks, P_STRIDES[k][0], 1, N, RANKS[k]) * scales[k]
            q = _tile(q_ptrs[k], ranks, cols, Q_STRIDES[k][0], Q_STRIDES[k][1], RANKS[k], D)
            added = _dot(p, q, added, PRECISION)
        if w_ptr is None:
            added = total + _masked(added, state_ptrs[k], thresholds[k], rows, first_col)
        total = added
    _put(out_ptr, rows, cols, D, 1, N, D, total)


@dataclass(frozen=True)
class Part:
    """One sibling, or at most MAX_RANK columns of its adapter: what a kernel reads and writes for it."""

    matrix: Tensor
    out: Tensor
    scale: float
    state: Tensor | None = None
    threshold: int = 0

    @classmethod
    def dropping(cls, matrix: Tensor, out: Tensor, states: Tensor, k: int, p: float) -> "Part":
        """Under the k-th mask."""
        return cls(matrix, out, 1 / (1 - p), states[k], threshold(p)) if p > 0 else cls(matrix, out, 1.0)

    def cut(self, axis: int) -> "Iterator[Part]":
        """Parts of at most MAX_RANK ranks, which are `matrix`'s `axis` and the other axis of `out`."""
        for start in range(0, self.matrix.shape[axis], MAX_RANK):
            size = min(MAX_RANK, self.matrix.shape[axis] - start)
            yield replace(
                self, matrix=self.matrix.narrow(axis, start, size), out=self.out.narrow(1 - axis, start, size)
            )


def fuses(d_in: int, dtype: torch.dtype) -> bool:
    """Whether x Wᵀ + b + α S Bᵀ is one Triton matmul, or cuBLAS's x Wᵀ and a pass over Y.

    The pass reads and writes Y: 2 · size bytes for each element. Triton's matmul is taken to need half as long again as
    cuBLAS's 2 · d_in FLOPs: LOSS · 2 · d_in. With the ratio of a GPU's FLOPs to its bytes the smaller one is found: the
    fused matmul for small d_in, where both are bound by memory. No GPU has measured this: LOSS is a guess, the ratios
    are an A100's data sheet's. Tests run both ways.
    """
    ratio = 160 if dtype.itemsize == 2 else 80 if _precision(dtype) == "tf32" else 10
    return LOSS * 2 * d_in < 2 * dtype.itemsize * ratio


def forward(
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    states: Tensor | None,
    projected: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> None:
    """Fill `outputs` with each Y (N, d_out) and `projected` with each S (N, r)."""
    input, weights, lora_A, lora_B, biases, scalings, dropout_p = _columns_of(tensors, numbers)
    with torch.cuda.device_of(input), torch.autocast(input.device.type, enabled=False):
        K = range(len(weights))
        _project(input, [Part.dropping(lora_A[k], projected[k], states, k, dropout_p[k]) for k in K])
        for sharing in _by_weight(weights):
            W = weights[sharing[0]]
            fused = len(sharing) == 1 and fuses(W.shape[1], input.dtype)
            # of those that share a product the last is finished in place
            base = input if fused else torch.mm(input, W.T, out=outputs[sharing[-1]])
            for k in sharing:
                part = Part(lora_B[k].T, outputs[k], scalings[k])
                _expand(base, W if fused else None, biases[k], [projected[k]], [part])


def backward(
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    states: Tensor | None,
    projected: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> None:
    """Fill each gradient that is not None."""
    input, weights, lora_A, lora_B, _, scalings, dropout_p = _columns_of(tensors, numbers)
    grad_input, grad_weights, grad_A, grad_B, grad_biases, *_ = _columns_of(grads, numbers)
    with torch.cuda.device_of(input), torch.autocast(input.device.type, enabled=False):
        dS: dict[int, Tensor] = {}  # of the siblings that need it
        for k, dY in enumerate(grad_outputs):
            if grad_input is not None or grad_A[k] is not None:
                dS[k] = torch.empty_like(projected[k])
            _adapter(dY, lora_B[k], projected[k], scalings[k], dS.get(k), grad_B[k])
            if (dW := grad_weights[k]) is not None:
                torch.mm(dY.T, input, out=dW)
            if (db := grad_biases[k]) is not None:
                torch.sum(dY, 0, out=db)
        _reduce(
            input,
            [Part.dropping(dS[k], dA, states, k, dropout_p[k]) for k, dA in enumerate(grad_A) if dA is not None],
        )
        if grad_input is not None:
            for i, sharing in enumerate(_by_weight(weights)):
                dY = grad_outputs[sharing[0]]
                for k in sharing[1:]:
                    dY = dY + grad_outputs[k]
                W = weights[sharing[0]]
                torch.addmm(grad_input, dY, W, beta=int(i > 0), out=grad_input)
            parts = [Part.dropping(A, grad_input, states, k, dropout_p[k]) for k, A in enumerate(lora_A)]
            for start in range(0, len(parts), MAX_SIBLINGS):
                batch = slice(start, start + MAX_SIBLINGS)
                _expand(grad_input, None, None, [dS[k] for k in range(len(parts))[batch]], parts[batch])


def _columns_of(tensors: Sequence[Any], numbers: Sequence[float]) -> tuple[Any, ...]:
    """The input, then what each field of `LoRA` is in every layer."""
    return tensors[0], *zip(*unpack(tensors, numbers), strict=True)


def _precision(*dtypes: torch.dtype) -> str:
    """How operands widened to float32 are multiplied, for results of these dtypes."""
    exact = torch.float32 in dtypes and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def _by_weight(weights: Sequence[Tensor]) -> list[list[int]]:
    """The siblings that share a weight, by their places."""
    found: dict[object, list[int]] = {}
    for k, W in enumerate(weights):
        found.setdefault((W.data_ptr(), W.shape, W.stride()), []).append(k)
    return list(found.values())


def _block_r(ranks: Sequence[int], most: int = MAX_RANK) -> int:
    """A power of two that matrix units take."""
    return min(most, max(16, triton.next_power_of_2(max(ranks))))


def _batches(parts: Sequence[Part], axis: int) -> Iterator[tuple[list[Part], list[int], int]]:
    """Parts that one launch takes, their ranks, and its BLOCK_R."""
    pieces = [piece for part in parts for piece in part.cut(axis)]
    ranks = [piece.matrix.shape[axis] for piece in pieces]
    if pieces:
        BLOCK_R = _block_r(ranks)
        size = min(MAX_SIBLINGS, MAX_RANK // BLOCK_R)
        for start in range(0, len(pieces), size):
            yield pieces[start : start + size], ranks[start : start + size], BLOCK_R


def _steps(blocks: int, others: int) -> int:
    """How many of `blocks` one program takes, a power of two, where `others` programs stand beside each."""
    programs = max(1, PROGRAMS // max(1, others))
    return max(1, triton.next_power_of_2(triton.cdiv(blocks, programs)))


def _partial(out: Tensor, count: int) -> Tensor:
    """Room for `count` summands of `out`: itself for one."""
    return out[None] if count == 1 else out.new_empty((count, *out.shape), dtype=torch.float32)


def _finish(outs: Sequence[Tensor], partial: Sequence[Tensor]) -> None:
    for out, summands in zip(outs, partial, strict=True):
        if len(summands) != 1:
            out.copy_(summands.sum(0))


def _project(x: Tensor, parts: Sequence[Part]) -> None:
    """out = scale (mask ⊙ x) matrixᵀ for each part: (N, D), (r, D) -> (N, r)."""
    N, D = x.shape
    for batch, ranks, BLOCK_R in _batches(parts, 0):
        precision = _precision(x.dtype, *(part.matrix.dtype for part in batch))
        tile = PROJECT[precision]
        matrices, outs, masks = _columns(batch)
        lora_linear_project_kernel[(triton.cdiv(N, tile.BLOCK_N),)](
            x, matrices, outs, *masks, N, *x.stride(), _strides(matrices), _strides(outs),
            D=D, RANKS=tuple(ranks), BLOCK_R=BLOCK_R, PRECISION=precision, **vars(tile),
        )  # fmt: skip


def _reduce(x: Tensor, parts: Sequence[Part]) -> None:
    """out = scale matrixᵀ (mask ⊙ x) for each part: (N, D), (N, r) -> (r, D)."""
    N, D = x.shape
    for batch, ranks, BLOCK_R in _batches(parts, 1):
        precision = _precision(*(part.out.dtype for part in batch))
        tile = REDUCE[precision]
        bands, blocks = triton.cdiv(D, tile.BLOCK_D), triton.cdiv(N, tile.BLOCK_N)
        steps = _steps(blocks, bands)
        chunks = max(1, triton.cdiv(blocks, steps))
        matrices, outs, masks = _columns(batch)
        sums = tuple(_partial(out, chunks) for out in outs)
        lora_linear_reduce_kernel[(chunks, bands)](
            x, matrices, sums, *masks, N, *x.stride(), _strides(matrices), _strides(sums),
            D=D, RANKS=tuple(ranks), STEPS=steps, BLOCK_R=BLOCK_R, PRECISION=precision, **vars(tile),
        )  # fmt: skip
        _finish(outs, sums)


def _adapter(dY: Tensor, B: Tensor, S: Tensor, scaling: float, dS: Tensor | None, dB: Tensor | None) -> None:
    """dS = α dY B, dB = α dYᵀ S: whichever there is room for."""
    N, D = dY.shape
    r = B.shape[1]
    # where the result is dS, it is what the gradients of A and B are that counts: their digits
    precision = _precision(dY.dtype, B.dtype)
    tile = ADAPTER[precision]
    # at once they leave dB of every block of points, r floats for BLOCK_N elements of dY, to be written and read
    once = r <= MAX_RANK and 2 * 4 * r <= tile.BLOCK_N * dY.element_size()
    if dS is None or dB is None or not once:
        if dS is not None:
            _project(dY, [Part(B.T, dS, scaling)])
        if dB is not None:
            _reduce(dY, [Part(S, dB.T, scaling)])
        return
    blocks, bands = triton.cdiv(N, tile.BLOCK_N), triton.cdiv(D, tile.BLOCK_D)
    steps = _steps(bands, blocks)
    bands = triton.cdiv(bands, steps)
    dS_sums, dB_sums = _partial(dS, bands), _partial(dB, blocks)
    lora_linear_adapter_kernel[(blocks, bands)](
        dY, B, S, dS_sums, dB_sums, scaling, N, *dY.stride(), B.stride(), S.stride(0),
        D=D, RANK=r, STEPS=steps, BLOCK_R=_block_r([r]),
        DS_PRECISION=precision, DB_PRECISION=_precision(B.dtype), **vars(tile),
    )  # fmt: skip
    _finish((dS, dB), (dS_sums, dB_sums))


def _expand(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, points: Sequence[Tensor], parts: Sequence[Part]
) -> None:
    """out = x weightᵀ + bias + Σ mask ⊙ (scale points matrix), one out: (N, r), (r, D) -> (N, D)."""
    matrices, (out, *_), masks = _columns(parts)
    N, D = out.shape
    precision = _precision(x.dtype)
    tile = (EXPAND if weight is None else FUSED)[precision]
    ranks = tuple(len(matrix) for matrix in matrices)
    weight_strides = (0, 0) if weight is None else weight.stride()
    lora_linear_expand_kernel[(triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(D, tile.BLOCK_D),)](
        x, weight, bias, tuple(points), matrices, out, *masks,
        N, *x.stride(), *weight_strides, 0 if bias is None else bias.stride(0), _strides(points), _strides(matrices),
        K=x.shape[1], D=D, RANKS=ranks, BLOCK_R=_block_r(ranks, RANK_STEP), PRECISION=precision,
        BLOCK_K=tile.BLOCK_D // 4, **vars(tile),
    )  # fmt: skip


def _columns(parts: Sequence[Part]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[tuple, tuple, tuple]]:
    """Of each part: its matrix, its out, and (state, threshold, scale)."""
    masks = tuple(p.state for p in parts), tuple(p.threshold for p in parts), tuple(p.scale for p in parts)
    return tuple(p.matrix for p in parts), tuple(p.out for p in parts), masks


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(x.stride() for x in tensors)
