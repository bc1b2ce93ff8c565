"""Two ways to the same numbers, chosen by cost: FLOPs over the matmul rate plus bytes over the bandwidth.

    direct   project block by block, reduce, overwrite the block with its gradient
    gram     eliminate D: every metric depends on inner products alone, and those on G = [W_s W_t]ᵀ[W_s W_t]

On the CPU gram works in the isometric coordinates of G's Cholesky factor, which has the FLOPs of the plain formula
and cancels only where the direct method does. The idea is Vincent et al. 2015 (arXiv 1606.08061).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import _native
from kdkernels.backend import Cost

METHODS = ("auto", "direct", "gram")

# NVIDIA's architectures that multiply float64 as fast as float32, or half as fast: those of data centres. On an H100,
# float32 at "highest", 8192 points, 768 and 1280 to 4096, cosine: direct 6.78 ms, gram 4.01 (frozen 3.98 and 1.90).
FLOAT64_ARCHITECTURES = ((8, 0), (9, 0), (10, 0))

# Over how many calls the Gram matrices of frozen projections are reckoned to pay.
FROZEN_CALLS = 16


@dataclass(frozen=True)
class Sizes:
    """What the cost of a call depends on. A width of `None` means that side has no projection."""

    N: int
    D: int
    d_s: int | None
    d_t: int | None
    itemsize: int
    backend: str
    metric: str
    low_precision: bool  # some matmul operand is narrower than float32
    needs: tuple[bool, ...]  # gradients of student, teacher, student_proj, teacher_proj, student_bias, teacher_bias
    frozen: bool = False  # no projection can change: Gram matrices are computed once for many calls
    gram_by_itself: bool = True  # whether "auto" may take gram where it costs less
    rate: int = 1  # of direct's products, as a multiple of gram's


def frozen(operands: Sequence[Tensor | None]) -> bool:
    """Whether no projection or bias requires grad, whether or not gradients are recorded now."""
    return not any(x is not None and x.requires_grad for x in operands[2:])


def sizes(operands: Sequence[Tensor | None], needs: Sequence[bool], backend: str, metric: str) -> Sizes:
    """The sizes of a call, from operands in the order of `schema.NAMES`."""
    student, _, student_proj, teacher_proj, *_ = operands
    assert student is not None
    projections = [w for w in (student_proj, teacher_proj) if w is not None]
    return Sizes(
        N=student.shape[0],
        D=projections[0].shape[0] if projections else student.shape[1],
        d_s=None if student_proj is None else student_proj.shape[1],
        d_t=None if teacher_proj is None else teacher_proj.shape[1],
        itemsize=max(4, *(x.dtype.itemsize for x in operands if x is not None)),
        backend=backend,
        metric=metric,
        low_precision=any(x is not None and x.dtype.itemsize < 4 for x in operands[:4]),
        needs=tuple(needs),
        frozen=backend == "native" and frozen(operands),  # on a GPU, noticing a change would need a synchronisation
        rate=_rate(operands, backend),
        gram_by_itself=backend == "native" or _gram_pays_on(student.device),
    )


def _rate(operands: Sequence[Tensor | None], backend: str) -> int:
    """bfloat16 points and projections meet as they are; gram's are float32 or wider."""
    narrow = all(x is None or x.dtype is torch.bfloat16 for x in operands[:4])
    return _native.module().bf16_rate() if backend == "native" and narrow else 1


def _gram_pays_on(device: torch.device) -> bool:
    """Whether FLOPs tell direct from gram on this GPU: its sums in float64 cost what float32's do, and direct has no
    faster arithmetic (TF32)."""
    return (
        device.type == "cuda"
        and torch.get_float32_matmul_precision() == "highest"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) in FLOAT64_ARCHITECTURES
    )


def direct_cost(s: Sizes) -> Cost:
    """Matmuls of the forward, of each input gradient and of each weight gradient; each block is touched thrice."""
    flops = passes = 0
    for width, needs_input, needs_weight in ((s.d_s, s.needs[0], s.needs[2]), (s.d_t, s.needs[1], s.needs[3])):
        if width is not None:
            flops += 2 * s.N * width * s.D * (1 + needs_input + needs_weight)
            passes += 3
    return Cost("direct", flops, passes * s.N * s.D * s.itemsize, rate=s.rate)


def gram_cost(s: Sizes) -> Cost:
    """The products of G, of each point with it, and of M; on the CPU triangular and symmetric ones count half.

    There the weight gradients are one (D, K) x (K, K) product; on a GPU each has its own blocks of M.
    """
    if s.d_s is None or s.d_t is None:
        return Cost("gram", 0, 0, "it needs both projections")
    if s.backend == "triton" and (s.metric != "cosine" or s.low_precision):
        # mse and angular would need the factor, whose conditioning only a synchronisation could tell; low precision
        # would trade its fast matmuls for float32 ones
        return Cost("gram", 0, 0, "on a GPU it serves cosine in float32")
    d_s, d_t = s.d_s, s.d_t
    K = d_s + d_t
    if s.backend == "triton":
        return _gram_cost_on_gpu(s, d_s, d_t)
    quadratic, cross = d_s * d_s + d_t * d_t, 2 * d_s * d_t  # FLOPs a point
    setup = s.D * (quadratic + cross) + K**3 // 3
    per_point = quadratic + cross + s.needs[0] * d_s * d_s + s.needs[1] * (d_t * d_t + cross)
    last = 0
    if any(s.needs[2:]):
        per_point += quadratic + cross
        last = 2 * s.D * K * (d_s * (s.needs[2] or s.needs[4]) + d_t * (s.needs[3] or s.needs[5]))
    flops = (setup // FROZEN_CALLS if s.frozen else setup) + s.N * per_point + last
    return Cost("gram", flops, (3 * s.N * K + 3 * K * K) * s.itemsize)


def _gram_cost_on_gpu(s: Sizes, d_s: int, d_t: int) -> Cost:
    ss, st, tt = d_s * d_s, d_s * d_t, d_t * d_t
    needs_s, needs_t = s.needs[2] or s.needs[4], s.needs[3] or s.needs[5]
    M = needs_s * ss + (needs_s or needs_t) * st + needs_t * tt
    last = needs_s * (ss + st) + needs_t * (st + tt)
    flops = 2 * (s.N * (ss + st + tt + s.needs[1] * st + M) + s.D * (ss + st + tt + last))
    K = d_s + d_t
    return Cost("gram", flops, (3 * s.N * K + 3 * K * K) * s.itemsize)


def choose(method: str, s: Sizes) -> tuple[str, tuple[Cost, ...]]:
    """The method to run, and the costs that decided it. Raises ValueError for a method that does not apply."""
    costs = (direct_cost(s), gram_cost(s))
    if method == "auto" and not s.gram_by_itself:
        return "direct", costs
    if method == "auto":
        return min((c for c in costs if c.why_not is None), key=lambda c: c.weight).method, costs
    chosen = next(c for c in costs if c.method == method)
    if chosen.why_not:
        raise ValueError(f"method={method!r} does not apply: {chosen.why_not}")
    return method, costs
