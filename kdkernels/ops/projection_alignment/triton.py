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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdkernels.launch import cdiv, on_its_device
from kdkernels.ops.projection_alignment import kernels
from kdkernels.ops.projection_alignment import method as methods
from kdkernels.products import Total, multiply

Operands = Sequence[Tensor | None]

BLOCK_BYTES = 256 * 2**20  # of buffers: enough rows to keep a large GPU's matmuls busy
MIN_ROWS = 128
STAGES = 3


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
    run = _direct
    if method != "direct":
        sizes = methods.sizes(operands, [g is not None for g in grads], "triton", metric)
        run = _gram if methods.choose(method, sizes)[0] == "gram" else _direct
    with on_its_device(losses):
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
        self.proj = None if proj is None else _as(proj, self.dtype)  # (D, d)

    @property
    def row_bytes(self) -> int:
        """Bytes of buffers for one row."""
        return 0 if self.proj is None else self.D * (4 + self.needs_dz * (self.dtype is not torch.float32) * 2)

    def allocate(self, rows: int) -> None:
        self.rows = rows
        self.sum_proj, self.sum_bias = Total(self.grad_proj), Total(self.grad_bias)
        if self.proj is not None:
            self.z_rows = self.x.new_empty((rows, self.D), dtype=torch.float32)
            in_place = self.dtype is torch.float32 or not self.needs_dz
            self.dz_rows = self.z_rows if in_place else self.x.new_empty((rows, self.D), dtype=self.dtype)

    def project(self, block: slice | None, w: Tensor | None) -> None:
        """The block's z = x Wᵀ (the kernel adds the bias), and the room for ∂z."""
        x = _rows(self.x, block)
        if self.proj is None:
            self.z, self.dz = x, _rows(self.grad_x, block)
            return
        if self.grad_proj is not None:
            x = _masked(x, w)
        self.x_rows = _as(x, self.dtype)
        n = x.shape[0]
        filled = None if n == self.rows else slice(n)
        self.z = _rows(self.z_rows, filled)
        self.dz = _rows(self.dz_rows, filled) if self.needs_dz else None
        multiply(self.x_rows, self.proj.t(), self.z)

    def differentiate(self, block: slice | None) -> None:
        """∂x = ∂z W, ∂W += ∂zᵀ x, ∂bias += Σ ∂z."""
        if self.proj is None or self.dz is None:
            return
        if self.grad_x is not None:
            if self.grad_x.dtype is self.dtype:
                torch.mm(self.dz, self.proj, out=_rows(self.grad_x, block))
            else:
                _rows(self.grad_x, block).copy_(self.dz.mm(self.proj))
        if self.grad_proj is not None:
            self.sum_proj.add_product(self.dz.t(), self.x_rows)
        if self.grad_bias is not None:
            self.sum_bias.add_rows(self.dz)

    def finish(self) -> None:
        self.sum_proj.finish()
        self.sum_bias.finish()


def _direct(
    operands: Operands, weights: Tensor | None, metric: str, scale: float, losses: Tensor, grads: Operands
) -> None:
    s, t = _Side(operands[0::2], grads[0::2]), _Side(operands[1::2], grads[1::2])
    N = losses.shape[0]
    rows = _rows_per_block(N, s.row_bytes + t.row_bytes)
    s.allocate(rows)
    t.allocate(rows)
    tile = tile_for(s.D)
    for block in _blocks(N, rows):
        w = _rows(weights, block)
        s.project(block, w)
        t.project(block, w)
        n = s.z.shape[0]
        kernels.direct(
            (cdiv(n, tile.BLOCK_N),), (s.z, t.z, s.bias, t.bias, w, _rows(losses, block), s.dz, t.dz), (n, scale),
            (*s.z.stride(), *t.z.stride(), *map(_stride, (s.bias, t.bias, w, s.dz, t.dz))),
            (s.D, metric, tile.BLOCK_N, tile.BLOCK_D), tile.num_warps, STAGES,
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
    G_ss, G_st, G_tt = (A.t().mm(B).float() for A, B in ((W_s, W_s), (W_s, W_t), (W_t, W_t)))
    K_s, K_t = G_st.shape
    needs_s = grad_W_s is not None or grad_bias_s is not None
    needs_t = grad_W_t is not None or grad_bias_t is not None
    M_ss = W_s.new_empty((K_s, K_s)) if needs_s else None
    M_st = W_s.new_empty((K_s, K_t)) if needs_s or needs_t else None
    M_tt = W_s.new_empty((K_t, K_t)) if needs_t else None

    N = losses.shape[0]
    rows = _rows_per_block(N, 12 * (K_s + K_t))
    tile = tile_for(max(K_s, K_t))
    for i, block in enumerate(_blocks(N, rows)):
        w = _rows(weights, block)
        s_block = _points(_rows(s, block), bias_s, w if M_st is not None else None)  # (n, K_s)
        t_block = _points(_rows(t, block), bias_t, w if M_st is not None else None)  # (n, K_t)
        n = s_block.shape[0]
        u = s_block.mm(G_ss)  # (n, K_s)
        v = t_block.mm(G_st.t())  # (n, K_s)
        c = t_block.mm(G_tt)  # (n, K_t)
        x = None if grad_t is None else s_block.mm(G_st)  # (n, K_t)
        kernels.gram(
            (cdiv(n, tile.BLOCK_N),),
            (s_block, u, v, t_block, c, x, w, _rows(losses, block), _rows(grad_s, block), _rows(grad_t, block)),
            (n, scale), (*s_block.stride(), *t_block.stride(), _stride(w)),
            (
                K_s, K_t, s.shape[1], t.shape[1], M_ss is not None, M_st is not None, M_tt is not None,
                tile.BLOCK_N, tile.BLOCK_D,
            ),
            tile.num_warps, STAGES,
        )  # fmt: skip
        if M_st is None:
            continue
        points_s, points_t = s_block.double(), t_block.double()
        for M, scaled, points in ((M_ss, u, points_s), (M_st, v, points_t), (M_tt, c, points_t)):
            if M is not None:
                torch.addmm(M, scaled.t().double(), points, beta=int(i > 0), out=M)

    for M_own, M_other, W, other, grad_W, grad_bias in (
        (M_ss, None if M_st is None else M_st.t(), W_s, W_t, grad_W_s, grad_bias_s),
        (M_tt, M_st, W_t, W_s, grad_W_t, grad_bias_t),
    ):
        if M_own is not None and M_other is not None and N > 0:
            _split(W.mm(M_own).addmm_(other, M_other), grad_W, grad_bias)
        else:
            for grad in (grad_W, grad_bias):
                if grad is not None:
                    grad.zero_()


def _blocks(N: int, rows: int) -> Iterator[slice | None]:
    """The rows of each block; None where one block is all."""
    if 0 < N <= rows:
        yield None
    else:
        yield from (slice(start, min(start + rows, N)) for start in range(0, N, rows))


def _rows(x: Any, block: slice | None) -> Any:
    return x if x is None or block is None else x[block]


def _rows_per_block(N: int, row_bytes: int) -> int:
    """Rows whose buffers fit BLOCK_BYTES, a multiple of MIN_ROWS; all rows where there are no buffers."""
    fitting = N if row_bytes == 0 else BLOCK_BYTES // row_bytes // MIN_ROWS * MIN_ROWS
    return max(1, min(N, max(fitting, MIN_ROWS)))


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes a microsecond of the host even where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def _masked(x: Tensor, w: Tensor | None) -> Tensor:
    """(n, d) with zeros in the rows that do not count: what they hold must not meet a zero in a matmul."""
    return x if w is None else x.masked_fill((w == 0)[:, None], 0)


def _points(x: Tensor, bias: Tensor | None, w: Tensor | None) -> Tensor:
    """(n, d) rows of the gram method in float32, with a column of ones where there is a bias."""
    x = _masked(x, w).to(torch.float32)
    return x if bias is None else torch.cat([x, x.new_ones((len(x), 1))], 1)


def _with_bias(W: Tensor, bias: Tensor | None) -> Tensor:
    """(D, d) or, with the bias as its last column, (D, d + 1), in float64."""
    W = W.double()
    return W if bias is None else torch.cat([W, bias.double()[:, None]], 1)


def _split(dW: Tensor, grad_W: Tensor | None, grad_bias: Tensor | None) -> None:
    """The inverse of `_with_bias` on gradients."""
    if grad_W is not None:
        grad_W.copy_(dW[:, : grad_W.shape[1]])
    if grad_bias is not None:
        grad_bias.copy_(dW[:, -1])
