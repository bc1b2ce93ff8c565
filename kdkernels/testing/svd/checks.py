"""What `validate` runs: every implementation × dtype of the decompositions, over all its cases."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.testing.check import FLOAT64_FLOOR, FLOAT64_SHARE, Check, devices
from kdkernels.testing.compare import Deviation, Outcome, deviations, errors
from kdkernels.testing.svd.inputs import exact, make_matrices, ours, plain

OPS = ("svd", "svdvals")

QUICK: dict[str, dict[str, Any]] = {
    "square": {"rows": 8, "cols": 8},
    "tall": {"rows": 21, "cols": 6},
    "wide": {"rows": 5, "cols": 12},
    "graded": {"kind": "graded", "rows": 16, "cols": 16},
    "ascending": {"kind": "ascending", "rows": 16, "cols": 16},
    "repeated": {"kind": "repeated"},
    "nearly orthogonal": {"kind": "nearly orthogonal", "rows": 8, "cols": 8},
    "low rank": {"kind": "low rank", "rows": 12, "cols": 9},
    "zero": {"kind": "zero"},
    "many": {"N": 70, "rows": 16, "cols": 16},
}
CASES: dict[str, dict[str, Any]] = QUICK | {
    "one number": {"rows": 1, "cols": 1},
    "one column": {"cols": 1},
    "one row": {"rows": 1},
    "no matrices": {"N": 0},
    "no columns": {"cols": 0},
    "33 columns": {"N": 3, "rows": 40, "cols": 33},
    "64 columns": {"N": 9, "rows": 64, "cols": 64},
    "above the crossover": {"N": 3, "rows": 130, "cols": 125},
}


def checks(quick: bool = False) -> Iterator[Check]:
    """All that can run on this machine."""
    for row in backends.TABLE:
        if row.op not in OPS:
            continue
        for device in devices(row):
            for dtype in row.dtypes:
                for name, arguments in (QUICK if quick else CASES).items():
                    full = {"dtype": dtype, "device": device} | arguments
                    compare = partial(compare_case, row.op, full, row.backend)
                    yield Check(row.op, row.backend, row.methods[0], device, dtype, "batch", name, compare)


def compare_case(op: str, arguments: dict[str, Any], backend: str) -> list[Deviation]:
    """Run one case and hold it to its budget."""
    target, yardstick = expectations(op, tuple(sorted(arguments.items())))
    return deviations(ours(op, make_matrices(**arguments), backend), target, yardstick)


@cache
def expectations(op: str, arguments: tuple[tuple[str, Any], ...]) -> tuple[Outcome, dict[str, float]]:
    """The float64 answer of a case and torch.linalg's errors; for float64 those of float32, scaled."""
    matrix = make_matrices(**dict(arguments))
    target = judged(matrix, exact(op, matrix))
    if matrix.real.dtype is not torch.float64:
        return target, errors(plain(op, matrix), target)
    narrow = matrix.to(torch.complex64 if matrix.is_complex() else torch.float32)
    found = errors(plain(op, narrow), judged(narrow, exact(op, narrow)))
    return target, {name: error * FLOAT64_SHARE + FLOAT64_FLOOR for name, error in found.items()}


def judged(matrix: Tensor, target: Outcome) -> Outcome:
    """A gradient where it exists: not of a rank that is not full."""
    rank_deficient = bool((target.loss[..., -1:] < 1e-12 * target.loss[..., :1]).any()) or not target.loss.any()
    return Outcome(target.loss, {}, target.name, target.others) if rank_deficient else target
