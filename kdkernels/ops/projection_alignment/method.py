"""Two ways to the same numbers, chosen by cost: FLOPs over the matmul rate plus bytes over the bandwidth.

    direct   project block by block, reduce, overwrite the block with its gradient
    gram     eliminate D: every metric depends on inner products alone, and those on G = [W_s W_t]ᵀ[W_s W_t]

On the CPU gram works in the isometric coordinates of G's Cholesky factor, which has the FLOPs of the plain formula
and cancels only where the direct method does. The idea is Vincent et al. 2015 (arXiv 1606.08061).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kdkernels.backend import Cost

METHODS = ("auto", "direct", "gram")

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
    )


def direct_cost(s: Sizes) -> Cost:
    """Matmuls of the forward, of each input gradient and of each weight gradient; each block is touched thrice."""
    flops = passes = 0
    for width, needs_input, needs_weight in ((s.d_s, s.needs[0], s.needs[2]), (s.d_t, s.needs[1], s.needs[3])):
        if width is not None:
            flops += 2 * s.N * width * s.D * (1 + needs_input + needs_weight)
            passes += 3
    return Cost("direct", flops, passes * s.N * s.D * s.itemsize)


def gram_cost(s: Sizes) -> Cost:
    """Triangular and symmetric products count half; the weight gradients are one (D, K) x (K, K) product."""
    if s.d_s is None or s.d_t is None:
        return Cost("gram", 0, 0, "it needs both projections")
    if s.backend == "triton" and (s.metric != "cosine" or s.low_precision):
        # mse and angular would need the factor, whose conditioning only a synchronisation could tell; low precision
        # would trade its fast matmuls for float32 ones
        return Cost("gram", 0, 0, "on a GPU it serves cosine in float32")
    d_s, d_t = s.d_s, s.d_t
    K = d_s + d_t
    quadratic, cross = d_s * d_s + d_t * d_t, 2 * d_s * d_t  # FLOPs a point
    setup = s.D * (quadratic + cross) + K**3 // 3
    per_point = quadratic + cross + s.needs[0] * d_s * d_s + s.needs[1] * (d_t * d_t + cross)
    last = 0
    if any(s.needs[2:]):
        per_point += quadratic + cross
        last = 2 * s.D * K * (d_s * (s.needs[2] or s.needs[4]) + d_t * (s.needs[3] or s.needs[5]))
    flops = (setup // FROZEN_CALLS if s.frozen else setup) + s.N * per_point + last
    return Cost("gram", flops, (3 * s.N * K + 3 * K * K) * s.itemsize)


def choose(method: str, s: Sizes) -> tuple[str, tuple[Cost, ...]]:
    """The method to run, and the costs that decided it. Raises ValueError for a method that does not apply."""
    costs = (direct_cost(s), gram_cost(s))
    if method == "auto" and s.backend == "triton":
        return "direct", costs  # gram has not been measured on a GPU yet: it runs where it is asked for
    if method == "auto":
        return min((c for c in costs if c.why_not is None), key=lambda c: c.weight).method, costs
    chosen = next(c for c in costs if c.method == method)
    if chosen.why_not:
        raise ValueError(f"method={method!r} does not apply: {chosen.why_not}")
    return method, costs
