"""How the kernels of layers with adapters cut their work, and what launches of them take beside tensors.

A small layer waits for the host, so what follows from shapes alone is found once for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from kdkernels.launch import cdiv, power_of_2
from kdkernels.ops.lora_linear.kernels import MAX_SIBLINGS
from kdkernels.philox import threshold

MAX_RANK = 64  # columns of adapters whose sums one program holds; more are more programs
RANK_STEP = 32  # columns of S that meet B, or of dS that meet A, at a time
KEPT = 1024  # plans of each kernel


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


@lru_cache(KEPT)
def dropping(rates: tuple[float, ...]) -> tuple[Mask, ...]:
    """Of siblings with these rates of dropout."""
    return tuple(Mask(k, threshold(p), 1 / (1 - p)) if p > 0 else Mask(-1, 0, 1.0) for k, p in enumerate(rates))


@lru_cache(KEPT)
def scaled(scale: float) -> tuple[Mask]:
    """Of one sibling, without dropout."""
    return (Mask(-1, 0, float(scale)),)


class Plan(NamedTuple):
    """A launch but for its tensors."""

    siblings: slice  # that it serves
    missing: tuple[None, ...]  # to as many as the kernel takes
    drops: bool
    grid: tuple[int, ...]
    scalars: tuple[float, ...]
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int


def batches(count: int, most: int) -> Iterator[slice]:
    """At most `most` at a time."""
    return (slice(start, start + most) for start in range(0, count, most))


def _block_r(rank: int, most: int = MAX_RANK) -> int:
    """A power of two that matrix units take."""
    return min(most, max(16, power_of_2(rank)))


def _steps(blocks: int, others: int, most: int) -> int:
    """How many of `blocks` one program takes, a power of two, where `others` programs stand beside each."""
    programs = max(1, most // max(1, others))
    return power_of_2(cdiv(blocks, programs))


def _rank_batches(ranks: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
    """Siblings that one launch takes, its BLOCK_R, and how many of those the largest rank needs."""
    if ranks:
        BLOCK_R = _block_r(max(ranks))
        for batch in batches(len(ranks), min(MAX_SIBLINGS, MAX_RANK // BLOCK_R)):
            yield batch, BLOCK_R, cdiv(max(ranks[batch]), BLOCK_R)


def _plan(
    siblings: slice,
    grid: tuple[int, ...],
    N: int,
    ranks: tuple[int, ...],
    masks: tuple[Mask, ...],
    constants: tuple[Any, ...],
    tile: Tile,
) -> Plan:
    """Of some siblings, from the ranks and masks of all."""
    ranks, masks = ranks[siblings], masks[siblings]
    places, thresholds, scales = zip(*masks, strict=True)
    missing = MAX_SIBLINGS - len(masks)
    scalars = (N, *thresholds, *(0,) * missing, *scales, *(0.0,) * missing)
    constants = (len(masks), *ranks, *(0,) * missing, *places, *(-1,) * missing, *constants)
    drops = max(places) >= 0
    return Plan(siblings, (None,) * missing, drops, grid, scalars, constants, tile.num_warps, tile.num_stages)


@lru_cache(KEPT)
def project_plans(
    N: int, D: int, ranks: tuple[int, ...], masks: tuple[Mask, ...], transposed: bool, precision: str
) -> list[Plan]:
    """Launches of the kernel that reads (N, D) for S, or for dS."""
    tile = PROJECT[precision]
    return [
        _plan(
            batch, (cdiv(N, tile.BLOCK_N), pieces), N, ranks, masks,
            (D, transposed, BLOCK_R, precision, tile.BLOCK_N, tile.BLOCK_D), tile,
        )
        for batch, BLOCK_R, pieces in _rank_batches(ranks)
    ]  # fmt: skip


@lru_cache(KEPT)
def reduce_plans(
    N: int, D: int, ranks: tuple[int, ...], masks: tuple[Mask, ...], transposed: bool, precision: str, programs: int
) -> list[Plan]:
    """Launches of the kernel that sums over points, in as many chunks as the grid's first size."""
    tile = REDUCE[precision]
    bands, blocks = cdiv(D, tile.BLOCK_D), cdiv(N, tile.BLOCK_N)
    steps = _steps(blocks, bands, programs)
    chunks = max(1, cdiv(blocks, steps))
    return [
        _plan(
            batch, (chunks, bands, pieces), N, ranks, masks,
            (D, transposed, steps, BLOCK_R, precision, tile.BLOCK_N, tile.BLOCK_D), tile,
        )
        for batch, BLOCK_R, pieces in _rank_batches(ranks)
    ]  # fmt: skip


@lru_cache(KEPT)
def adapter_plan(
    N: int, D: int, r: int, precision: str, db_precision: str, programs: int
) -> tuple[tuple[int, int], tuple[Any, ...]]:
    """The grid, which is also how many summands dB and dS have, and the constants."""
    tile = ADAPTER[precision]
    blocks, bands = cdiv(N, tile.BLOCK_N), cdiv(D, tile.BLOCK_D)
    steps = _steps(bands, blocks, programs)
    constants = (D, r, steps, _block_r(r), precision, db_precision, tile.BLOCK_N, tile.BLOCK_D)
    return (blocks, cdiv(bands, steps)), constants


@lru_cache(KEPT)
def expand_plan(
    N: int,
    D: int,
    width: int,
    fused: bool,
    ranks: tuple[int, ...],
    masks: tuple[Mask, ...],
    transposed: bool,
    precision: str,
) -> Plan:
    """The launch of the kernel that adds every sibling to the base."""
    tile = (FUSED if fused else EXPAND)[precision]
    BLOCK_R = _block_r(max(ranks), RANK_STEP)
    return _plan(
        slice(None), (cdiv(N, tile.BLOCK_N) * cdiv(D, tile.BLOCK_D),), N, ranks, masks,
        (width, D, transposed, BLOCK_R, precision, tile.BLOCK_N, tile.BLOCK_D, tile.BLOCK_D // 4), tile,
    )  # fmt: skip
