"""What `validate` runs: every implementation × method × dtype × metric of projection alignment, over all its cases.

The cases are chosen so that each kernel decides the outcome of one: each side with and without projection, bias and
gradient, weights of every kind, both reductions, hostile inputs, and sizes past every block of the implementations.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from kdkernels import backend as backends
from kdkernels.ops.projection_alignment import method as methods
from kdkernels.ops.projection_alignment.reference import METRICS
from kdkernels.testing.check import FLOAT64_FLOOR, FLOAT64_SHARE, Check, devices
from kdkernels.testing.compare import Deviation, Outcome, deviations, errors
from kdkernels.testing.projection_alignment.inputs import (
    Inputs,
    divisor,
    eager,
    eager_pointwise,
    exact,
    interpreted,
    make_inputs,
    ours,
)

OP = "projection_alignment_loss"
PROJECTIONS = ("student_proj", "teacher_proj", "student_bias", "teacher_bias")

# Arguments of make_inputs by name. `wide` and the `blocks` go past the blocks that implementations work in.
QUICK: dict[str, dict[str, Any]] = {
    "both sides": {},
    "frozen teacher, signed weights": {"frozen": ("teacher", "teacher_proj", "teacher_bias"), "weights": "signed"},
    "frozen projections, second step": {"frozen": ("teacher", *PROJECTIONS), "bias": False, "steps": 2},
    "student side": {"sides": "student", "weights": "nan"},
    "teacher side": {"sides": "teacher", "bias": False},
    "neither side": {"sides": "neither", "weights": "mask"},
    "points": {"reduction": "none", "weights": "signed"},
    "close": {"regime": "close", "bias": False},
    "wide": {"N": 21, "d_s": 131, "d_t": 35, "D": 700, "weights": "signed"},
}
CASES: dict[str, dict[str, Any]] = QUICK | {
    "parallel": {"regime": "parallel"},
    "antiparallel": {"regime": "antiparallel"},
    "zero vectors": {"regime": "zero"},
    "close, student side": {"regime": "close", "sides": "student"},
    "parallel, teacher side": {"regime": "parallel", "sides": "teacher"},
    "antiparallel, neither side": {"regime": "antiparallel", "sides": "neither"},
    "frozen student": {"frozen": ("student", "student_proj", "student_bias"), "reduction": "sum"},
    "frozen projections with biases": {"frozen": PROJECTIONS, "steps": 2},
    "frozen projection, student side": {"sides": "student", "frozen": ("teacher", *PROJECTIONS), "steps": 2},
    "only projections": {"frozen": ("student", "teacher"), "weights": "mask"},
    "forward only": {"frozen": ("student", "teacher", *PROJECTIONS)},
    "points, student side": {"reduction": "none", "sides": "student"},
    "D below d_s + d_t": {"D": 19},
    "one point": {"N": 1},
    "no points": {"N": 0},
    "D = 1": {"D": 1, "d_s": 3, "d_t": 2, "metric": "mse"},
    "blocks": {"N": 300, "d_s": 261, "d_t": 60, "D": 1100, "weights": "signed"},
    "blocks of D": {"N": 40, "d_s": 12, "d_t": 7, "D": 2100, "bias": False},
    "blocks of points": {"N": 2100, "d_s": 9, "d_t": 7, "D": 33, "weights": "mask", "reduction": "none"},
    "blocks, student side": {"N": 517, "d_s": 140, "D": 530, "sides": "student"},
}


def checks(quick: bool = False) -> Iterator[Check]:
    """All that can run on this machine."""
    for row in backends.TABLE:
        if row.op != OP:
            continue
        for device in devices(row):
            for method in row.methods:
                for dtype in row.dtypes:
                    for metric in METRICS:
                        yield from cases(row.backend, method, device, dtype, metric, quick)


def cases(backend: str, method: str, device: str, dtype: torch.dtype, metric: str, quick: bool) -> Iterator[Check]:
    """The cases of one implementation, method, dtype and metric."""
    for name, arguments in (QUICK if quick else CASES).items():
        if arguments.get("metric", metric) != metric:
            continue
        full: dict[str, Any] = {"metric": metric, "dtype": dtype, "device": device} | arguments
        if not applies(backend, method, make_inputs(**full)):
            continue
        compare = partial(compare_case, full, backend, method)
        yield Check(OP, backend, method, device, dtype, metric, name, compare)


def applies(backend: str, method: str, inputs: Inputs) -> bool:
    """Whether the method exists for this case: the Gram method needs something to eliminate."""
    if backend == "reference":
        return True
    _, costs = methods.choose("auto", methods.sizes(inputs.operands, inputs.needs, backend, inputs.metric))
    return all(cost.why_not is None for cost in costs if cost.method == method)


def compare_case(arguments: dict[str, Any], backend: str, method: str) -> list[Deviation]:
    """Run one case and hold it to its budget."""
    inputs = make_inputs(**arguments)
    target, yardstick = expectations(tuple(sorted(arguments.items())))
    if backend == "triton" and arguments["device"] == "cpu":
        return deviations(interpreted(inputs, backend, method), target, yardstick)
    return deviations(ours(inputs, backend, method), target, yardstick)


@cache
def expectations(arguments: tuple[tuple[str, Any], ...]) -> tuple[Outcome, dict[str, float]]:
    """The float64 answer of a case and eager's errors: the same for every implementation."""
    inputs = make_inputs(**dict(arguments))
    return exact(inputs), eager_errors(inputs)


def judge(inputs: Inputs, outcome: Outcome) -> list[Deviation]:
    """The errors of `outcome` against float64, with budgets from eager PyTorch's."""
    return deviations(outcome, exact(inputs), eager_errors(inputs))


def eager_errors(inputs: Inputs) -> dict[str, float]:
    """Eager PyTorch's errors on these inputs; for float64 those of its float32 run, scaled by the ratio of roundings.

    The error of a sum is luck, since its points cancel: a reduced loss gets the sum of their absolute errors.
    """
    wide = inputs.operands[0].dtype is torch.float64  # type: ignore[union-attr]
    narrow = inputs.to(dtype=torch.float32) if wide else inputs
    target = exact(narrow)
    found = errors(eager(narrow), target)
    if inputs.reduction != "none":
        points, exact_points = (
            eager_pointwise(x, x.operands).double() / divisor(x, torch.float64)
            for x in (narrow, narrow.to(dtype=torch.float64))
        )
        spread = (points - exact_points).abs().sum() / (target.loss.abs() or 1)
        found["loss"] = max(found["loss"], spread.item())
    return {name: error * FLOAT64_SHARE + FLOAT64_FLOOR if wide else error for name, error in found.items()}
