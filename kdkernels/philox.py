"""Random numbers that are a function of where they are used: Philox 4×32-10 (Salmon et al. 2011, SC'11).

Element (row, column) of a dropout mask is word `column % 4` of the block that encrypts the counter
(column // 4, row, offset low, offset high) under the key (seed low, seed high). So any backend, thread or tile draws
the same mask, in any order, and nothing has to be stored. csrc/common/philox.h is the same function in C++ and CUDA.
"""

import torch
import torch.distributed as dist
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four words (int64 tensors in [0, 2³²)) for a counter of four words and a key of two, which broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = (product(c, m) for c, m in zip((c0, c2), MULTIPLIERS, strict=True))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product, by halves: 64 signed bits must not overflow in compiled code."""
    low = word * (multiplier & 0xFFFF)  # below 2^48, as `middle` is below 2^49
    middle = word * (multiplier >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def threshold(p: float) -> int:
    """An element is dropped when its word is below this: with probability p, to 2⁻³²."""
    return min(round(p * 2**32), MASK)


def keep_mask(state: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """(rows, cols) bool: which elements dropout with probability p keeps, for a state of (seed, offset)."""
    seed, offset = state[0], state[1]
    row = torch.arange(rows, device=state.device)[:, None]  # (rows, 1)
    block = torch.arange((cols + 3) // 4, device=state.device)[None, :]  # (1, cols/4)
    counter = (block, row, offset & MASK, (offset >> 32) & MASK)
    words = torch.stack(philox4x32(counter, (seed & MASK, (seed >> 32) & MASK)), -1)  # (rows, cols/4, 4)
    return words.flatten(1)[:, :cols] >= threshold(p)


def draw_states(count: int, device: torch.device) -> Tensor:
    """(count, 2) int64: seeds and offsets from torch's generator of the device, without waiting for it.

    So `torch.manual_seed` repeats masks, and checkpointing, which restores the generator, recomputes them. Ranks of a
    process group, which often share a seed, get different ones.
    """
    room = torch.empty(count, 2, dtype=torch.int64, device=device)
    return _drawn(room) if torch.compiler.is_compiling() else _fill(room)


def _fill(states: Tensor) -> Tensor:
    """One kernel, and one more on other ranks than the first: no host memory is read, so CUDA graphs draw anew."""
    states.random_(-(2**63), 2**63 - 1)
    if dist.is_available() and dist.is_initialized() and (rank := dist.get_rank()):
        states[:, 1] += rank
    return states


def _draw(room: Tensor) -> Tensor:
    return _fill(torch.empty_like(room))


# An operator of its own, because compilers would draw a plain randint from a generator of theirs: other masks. Its
# argument is the room, because they merge two calls with equal arguments, but never two calls of torch.empty.
_drawn = torch.library.custom_op(
    "kdkernels::draw_states", _draw, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)


@_drawn.register_fake
def _(room: Tensor) -> Tensor:
    return torch.empty_like(room)
