"""What the operators of this room cost, for `kd.explain`."""

from collections.abc import Sequence
from functools import partial
from math import prod

from torch import Tensor

from kdkernels.backend import TABLE, Cost, Explanation, passed_over, register_explainer
from kdkernels.ops.hankel import api
from kdkernels.ops.hankel.native import LARGEST
from kdkernels.ops.hankel.realization import OVERSAMPLE, BlockHankel, check_sequence, era, hankel_svd, is_small
from kdkernels.ops.hankel.systems import Operand, Systems, check
from kdkernels.ops.hankel.truncation import balanced_truncation, orders
from kdkernels.ops.svd.api import jacobi_flops


def _explain_systems(
    op: str, backend: str, horizon: int | None = None, real_output: bool = False, **system: Operand
) -> Explanation:
    return _explain(op, *api.arguments(**system, horizon=horizon, real_output=real_output), backend)


def _explain_truncation(
    rank: int | Sequence[int] | None, tolerance: float | None, error: float | None, backend: str, **system: Operand
) -> Explanation:
    systems = check(**system)
    orders(systems, rank, tolerance, error)
    return _explain("balanced_truncation", systems, None, backend)


def _explain(op: str, systems: Systems, horizon: int | None, backend: str) -> Explanation:
    chosen = api.choose(op, backend, systems)
    truncates = op == "balanced_truncation"
    doublings = 0 if horizon is None else horizon.bit_length() - 1
    flops = dict.fromkeys(("generator", "jacobi", "lapack", "trace"), 0)
    moved, largest = 0, 0
    for member in systems.members:
        N, n, m, p = prod(member.leading), member.order, member.B.shape[-1], member.C.shape[-2]
        real = N * (4 if member.B.is_complex() else 1)
        generator = real * 6 * n * n * (min(m, n) + min(p, n))  # of both factors
        if horizon is not None:  # doubling: a QR of 2n columns for each binary digit
            generator = real * (2 * 8 * n**3 * doublings + 2 * n * n * (m + p))
        product = 2 * n**3  # M
        if truncates:  # T and W, their products with the system, eigenvectors of what is left (Golub and Van Loan, 7.5)
            product += 4 * n**3 + 2 * n * n * (m + p) + 2 * n**3 + 25 * n**3
        flops["generator"] += generator
        flops["jacobi"] += generator + real * (product + jacobi_flops(n, n, truncates))
        flops["lapack"] += generator + real * (product + (3 + 19 * truncates) * n**3)
        flops["trace"] += real * 2 * n * n * (m + p + 3)
        moved += N * member.B.element_size() * n * (2 + m + p)
        largest = max(largest, n)
    above = f"it serves up to {LARGEST} states" if largest > LARGEST else None
    methods = dict.fromkeys(m for row in TABLE if row.op == op for m in row.methods)
    costs = tuple(Cost(name, flops[name], moved, above if name == "jacobi" else None) for name in methods)
    method = next(m for m in chosen.methods if not (m == "jacobi" and above))
    reasons = passed_over(op, chosen, *api.kinds(systems))
    return Explanation(op, chosen.backend, method, reasons, costs)


def _explain_realization(op: str, markov: Tensor, rank: int) -> Explanation:
    check_sequence(op, markov, rank)
    H = BlockHankel(markov.detach())
    N, rows, cols = H.shape
    large, small, width = max(rows, cols), min(rows, cols), rank + OVERSAMPLE
    real = N * (4 if markov.is_complex() else 1)
    size = H.length
    # a product: transforms of both operands and of the result (5 T log T each), and T little products between them
    product = size * (5 * size.bit_length() * (H.p * H.m + (H.p + H.m) * width) + 8 * H.p * H.m * width)
    orthogonal = 4 * large * width**2
    steps = 2 * 10  # products and orthogonalisations of about ten iterations
    costs = (
        Cost("dense", real * 22 * small**2 * large, N * 16 * rows * cols, None if is_small(H, rank) else "H is large"),
        Cost("fft", steps * (N * product + real * orthogonal), N * 16 * (H.p + H.m) * size * width),
    )
    method = "dense" if is_small(H, rank) else "fft"
    return Explanation(op, "reference", method, {}, costs)


register_explainer(api.gramian_factors, partial(_explain_systems, "gramian_factors"))
register_explainer(api.hankel_singular_values, partial(_explain_systems, "hankel_singular_values"))
register_explainer(api.hankel_energy, partial(_explain_systems, "hankel_energy"))
register_explainer(balanced_truncation, _explain_truncation)
register_explainer(hankel_svd, partial(_explain_realization, "hankel_svd"))
register_explainer(era, partial(_explain_realization, "era"))
