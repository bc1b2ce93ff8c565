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

Sums that many programs share end in `lora_linear_sum_kernel`, one launch for all that are known by then. What kernels
write is contiguous, as small operands are; so strides are those of activations and weights alone.

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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.launch import cdiv, power_of_2, undisturbed
from kdkernels.ops.lora_linear import kernels
from kdkernels.philox import threshold

MAX_RANK = 64  # columns of adapters whose sums one program holds; more are more programs
RANK_STEP = 32  # columns of S that meet B, or of dS that meet A, at a time
LOSS = 0.5  # of Triton's matmul against cuBLAS's, as a share of its time
PROGRAMS = 512  # enough to fill a large GPU: sums over points are cut until there are as many
SUM = (16, 128)  # summands and columns at a time


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


class Mask(NamedTuple):
    """What a kernel does to what one sibling reads: dropout, with its scale, or a scale alone."""

    place: int  # of its state among all siblings'; -1 without dropout
    threshold: int
    scale: float


def _mask(k: int, p: float) -> Mask:
    return Mask(k, threshold(p), 1 / (1 - p)) if p > 0 else _scaled(1.0)


def _scaled(scale: float) -> Mask:
    return Mask(-1, 0, float(scale))


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
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    outputs: Sequence[Tensor],
    projected: Sequence[Tensor],
) -> None:
    """Fill `outputs` with each Y (N, d_out) and `projected` with each S (N, r)."""
    with undisturbed(input):
        _project(input, lora_A, projected, [_mask(k, p) for k, p in enumerate(dropout_p)], states, False)
        for sharing in _by_weight(weights):
            W = weights[sharing[0]]
            fused = len(sharing) == 1 and fuses(W.shape[1], input.dtype)
            # of those that share a product the last is finished in place
            base = input if fused else torch.mm(input, W.t(), out=outputs[sharing[-1]])
            for k in sharing:
                adapter = [projected[k]], [lora_B[k]], outputs[k], [_scaled(scalings[k])]
                _expand(base, W if fused else None, biases[k], *adapter, None, True)


def backward(
    grad_outputs: Sequence[Tensor],
    input: Tensor,
    projected: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    states: Tensor,
    grad_input: Tensor | None,
    grad_weights: Sequence[Tensor | None],
    grad_biases: Sequence[Tensor | None],
    grad_A: Sequence[Tensor | None],
    grad_B: Sequence[Tensor | None],
) -> None:
    """Fill each gradient that is not None."""
    K = range(len(weights))
    with undisturbed(input):
        points: list[Tensor | None] = [
            None if grad_input is None and grad_A[k] is None else torch.empty_like(projected[k]) for k in K
        ]  # each dS
        first, later = Sums(), Sums()  # what the next kernels read, and what nobody here does
        for k, dY in enumerate(grad_outputs):
            _adapter(dY, lora_B[k], projected[k], scalings[k], points[k], grad_B[k], first, later)
            if (dW := grad_weights[k]) is not None:
                torch.mm(dY.t(), input, out=dW)
            if (db := grad_biases[k]) is not None:
                torch.sum(dY, 0, out=db)
        first.run()
        masks = [_mask(k, p) for k, p in enumerate(dropout_p)]
        trained = [k for k in K if grad_A[k] is not None]
        dA, of_dA = [grad_A[k] for k in trained], [masks[k] for k in trained]
        _reduce(input, [points[k] for k in trained], dA, of_dA, states, False, later)
        later.run()
        if grad_input is not None:
            for i, sharing in enumerate(_by_weight(weights)):
                dY = grad_outputs[sharing[0]]
                for k in sharing[1:]:
                    dY = dY + grad_outputs[k]
                W = weights[sharing[0]]
                if i == 0:
                    torch.mm(dY, W, out=grad_input)
                else:
                    torch.addmm(grad_input, dY, W, out=grad_input)
            for batch in _batches(len(weights), kernels.MAX_SIBLINGS):
                _expand(grad_input, None, None, points[batch], lora_A[batch], grad_input, masks[batch], states, False)


class Sums:
    """Sums that programs of other kernels have left in parts, to be finished together."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def room(self, out: Tensor, count: int) -> Tensor:
        """Room for `count` summands of a contiguous `out`: itself for one."""
        if count == 1:
            return out
        parts = out.new_empty((count, *out.shape), dtype=torch.float32)
        self.pairs.append((parts, out))
        return parts

    def run(self) -> None:
        """Finish them."""
        BLOCK_N, BLOCK_D = SUM
        for batch in _batches(len(self.pairs), kernels.MAX_SUMS):
            pairs = self.pairs[batch]
            sizes, counts = [out.numel() for _, out in pairs], [len(x) for x, _ in pairs]
            tensors = *_padded([x for x, _ in pairs], None, 8), *_padded([out for _, out in pairs], None, 8)
            scalars = *_padded(counts, 0, 8), *_padded(sizes, 0, 8)
            steps = power_of_2(cdiv(max(counts), BLOCK_N))
            grid = (cdiv(max(sizes), BLOCK_D), len(pairs))
            kernels.sum(grid, tensors, scalars, (), (len(pairs), steps, BLOCK_N, BLOCK_D), 4, 2)


def _precision(*dtypes: torch.dtype) -> str:
    """How operands widened to float32 are multiplied, for results of these dtypes."""
    exact = torch.float32 in dtypes and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def _by_weight(weights: Sequence[Tensor]) -> list[list[int]]:
    """The siblings that share a weight, by their places."""
    if len(weights) == 1:
        return [[0]]
    found: dict[object, list[int]] = {}
    for k, W in enumerate(weights):
        found.setdefault((W.data_ptr(), W.shape, W.stride()), []).append(k)
    return list(found.values())


def _batches(count: int, most: int) -> Iterator[slice]:
    return (slice(start, start + most) for start in range(0, count, most))


def _padded(values: Sequence[Any], filling: Any, count: int = kernels.MAX_SIBLINGS) -> list[Any]:
    return [*values, *[filling] * (count - len(values))]


def _flat(tensors: Sequence[Any]) -> list[Any]:
    """Small operands, contiguous."""
    return [x if x.is_contiguous() else x.contiguous() for x in tensors]


def _block_r(rank: int, most: int = MAX_RANK) -> int:
    """A power of two that matrix units take."""
    return min(most, max(16, power_of_2(rank)))


def _rank_batches(ranks: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
    """Siblings that one launch takes, its BLOCK_R, and how many of those the largest rank needs."""
    if ranks:
        BLOCK_R = _block_r(max(ranks))
        for batch in _batches(len(ranks), min(kernels.MAX_SIBLINGS, MAX_RANK // BLOCK_R)):
            yield batch, BLOCK_R, cdiv(max(ranks[batch]), BLOCK_R)


def _steps(blocks: int, others: int) -> int:
    """How many of `blocks` one program takes, a power of two, where `others` programs stand beside each."""
    programs = max(1, PROGRAMS // max(1, others))
    return power_of_2(cdiv(blocks, programs))


def _project(
    x: Tensor,
    matrices: Sequence[Any],
    outs: Sequence[Any],
    masks: Sequence[Mask],
    states: Tensor | None,
    transposed: bool,
) -> None:
    """out = scale (mask ⊙ x) matrixᵀ for each: (N, D), (r, D) or its transpose -> (N, r)."""
    N, D = x.shape
    ranks = [out.shape[1] for out in outs]
    for batch, BLOCK_R, pieces in _rank_batches(ranks):
        m = _flat(matrices[batch])
        precision = _precision(x.dtype, *(x.dtype for x in m))
        tile = PROJECT[precision]
        lead, scalars, constants = _siblings(N, ranks[batch], masks[batch], states)
        kernels.project(
            (cdiv(N, tile.BLOCK_N), pieces), (x, *_padded(m, None), *_padded(outs[batch], None), lead), scalars,
            x.stride(), (*constants, D, transposed, BLOCK_R, precision, tile.BLOCK_N, tile.BLOCK_D),
            tile.num_warps, tile.num_stages,
        )  # fmt: skip


def _reduce(
    x: Tensor,
    matrices: Sequence[Any],
    outs: Sequence[Any],
    masks: Sequence[Mask],
    states: Tensor | None,
    transposed: bool,
    sums: Sums,
) -> None:
    """out = scale matrixᵀ (mask ⊙ x) for each: (N, D), (N, r) -> (r, D) or its transpose."""
    N, D = x.shape
    ranks = [m.shape[1] for m in matrices]
    for batch, BLOCK_R, pieces in _rank_batches(ranks):
        precision = _precision(*(out.dtype for out in outs[batch]))
        tile = REDUCE[precision]
        bands, blocks = cdiv(D, tile.BLOCK_D), cdiv(N, tile.BLOCK_N)
        steps = _steps(blocks, bands)
        chunks = max(1, cdiv(blocks, steps))
        parts = [sums.room(out, chunks) for out in outs[batch]]
        lead, scalars, constants = _siblings(N, ranks[batch], masks[batch], states)
        kernels.reduce(
            (chunks, bands, pieces), (x, *_padded(_flat(matrices[batch]), None), *_padded(parts, None), lead), scalars,
            x.stride(), (*constants, D, transposed, steps, BLOCK_R, precision, tile.BLOCK_N, tile.BLOCK_D),
            tile.num_warps, tile.num_stages,
        )  # fmt: skip


def _adapter(
    dY: Tensor, B: Tensor, S: Tensor, scaling: float, dS: Tensor | None, dB: Tensor | None, first: Sums, later: Sums
) -> None:
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
            _project(dY, [B], [dS], [_scaled(scaling)], None, True)
        if dB is not None:
            _reduce(dY, [S], [dB], [_scaled(scaling)], None, True, later)
        return
    blocks, bands = cdiv(N, tile.BLOCK_N), cdiv(D, tile.BLOCK_D)
    steps = _steps(bands, blocks)
    bands = cdiv(bands, steps)
    kernels.adapter(
        (blocks, bands), (dY, *_flat([B, S]), first.room(dS, bands), later.room(dB, blocks)), (N, float(scaling)),
        dY.stride(), (D, r, steps, _block_r(r), precision, _precision(B.dtype), tile.BLOCK_N, tile.BLOCK_D),
        tile.num_warps, tile.num_stages,
    )  # fmt: skip


def _expand(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    points: Sequence[Any],
    matrices: Sequence[Any],
    out: Tensor,
    masks: Sequence[Mask],
    states: Tensor | None,
    transposed: bool,
) -> None:
    """out = x weightᵀ + bias + Σ mask ⊙ (scale points matrix): (N, r), (r, D) or its transpose -> (N, D)."""
    N, D = out.shape
    precision = _precision(x.dtype)
    tile = (EXPAND if weight is None else FUSED)[precision]
    ranks = [p.shape[1] for p in points]
    lead, scalars, constants = _siblings(N, ranks, masks, states)
    operands = *_padded(_flat(points), None), *_padded(_flat(matrices), None)
    kernels.expand(
        (cdiv(N, tile.BLOCK_N) * cdiv(D, tile.BLOCK_D),),
        (x, weight, None if bias is None else bias.contiguous(), *operands, out, lead), scalars,
        (*x.stride(), *((0, 0) if weight is None else weight.stride())),
        (
            *constants, x.shape[1], D, transposed, _block_r(max(ranks), RANK_STEP), precision,
            tile.BLOCK_N, tile.BLOCK_D, tile.BLOCK_D // 4,
        ),
        tile.num_warps, tile.num_stages,
    )  # fmt: skip


def _siblings(
    N: int, ranks: Sequence[int], masks: Sequence[Mask], states: Tensor | None
) -> tuple[Tensor | None, tuple[Any, ...], tuple[Any, ...]]:
    """What kernels take of siblings beside their tensors: states, scalars and constants."""
    K = len(masks)
    places, thresholds, scales = zip(*masks, strict=True)
    missing = kernels.MAX_SIBLINGS - K
    scalars = (N, *thresholds, *(0,) * missing, *scales, *(0.0,) * missing)
    constants = (K, *ranks, *(0,) * missing, *places, *(-1,) * missing)
    return states if max(places) >= 0 else None, scalars, constants
