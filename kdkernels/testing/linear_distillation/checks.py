"""What `validate` runs: every implementation × dtype × divergence of the linear distillation loss, over all its cases.

The cases are chosen so that each part of the kernels decides the outcome of one: every kind of teacher and mixture,
heads with and without bias, adapter, scale and softcap, labels, weights of every kind, both reductions, vocabularies of
different sizes, hostile logits, and sizes past every block of the implementations.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from kdkernels import backend as backends
from kdkernels.ops.linear_distillation.reference import DIVERGENCES
from kdkernels.testing.check import FLOAT64_FLOOR, FLOAT64_SHARE, Check, devices
from kdkernels.testing.compare import Deviation, Outcome, deviations, errors
from kdkernels.testing.linear_distillation.inputs import (
    Inputs,
    eager,
    eager_pointwise,
    exact,
    interpreted,
    make_inputs,
    ours,
)

OP = "linear_distillation_loss"
FEWER = 7  # points

QUICK: dict[str, dict[str, Any]] = {
    "one teacher": {"temperature": 2.0},
    "plain, labels": {"plain": True, "labels": True, "alpha": 0.3, "weights": "nan"},
    "three teachers": {"K": 3, "given": "each", "temperature": 3.0, "labels": True, "alpha": 0.6},
    "geometric": {"K": 2, "mixture": "geometric", "temperature": 0.5, "weights": "signed", "reduction": "none"},
    "mapped": {"K": 2, "vocabulary": "mapped", "labels": True, "alpha": 0.5, "temperature": 1.5},
    "impossible tokens": {"K": 2, "regime": "impossible"},
    "close": {"regime": "close"},
    "wide": {"N": 5, "V": 2200, "d_s": 130, "d_t": 61, "K": 2, "temperature": 2.0},
}
CASES: dict[str, dict[str, Any]] = QUICK | {
    "logits": {"given": "logits", "student_logits": True, "labels": True, "alpha": 0.4, "temperature": 2.0},
    "top k": {"given": "top k", "K": 2, "temperature": 2.0},
    "truncated": {"K": 2, "vocabulary": "truncated", "given": "each", "labels": True, "alpha": 0.5},
    "longer": {"K": 3, "vocabulary": "longer", "given": "each", "mixture": "geometric"},
    "mapped logits": {"K": 2, "vocabulary": "mapped", "given": "logits", "reduction": "sum", "weights": "mask"},
    "huge": {"regime": "huge", "temperature": 0.1},
    "huge and hot": {"regime": "huge", "temperature": 100.0, "labels": True, "alpha": 0.5},
    "one hot": {"regime": "one hot", "temperature": 0.1, "seed": 4},
    "unequal shares": {"K": 3, "teacher_weights": (0.7, 0.0, 0.3), "beta": 0.1},
    "frozen head": {"frozen": ("student_head", "bias"), "weights": "signed"},
    "frozen states": {"frozen": ("student", "lora_A", "lora_B"), "reduction": "none"},
    "forward only": {"frozen": ("student", "student_head", "bias", "lora_A", "lora_B"), "K": 2},
    "plain": {"plain": True, "temperature": 2.0},
    "plain, summed, frozen states": {"plain": True, "frozen": ("student",), "reduction": "sum"},
    "labels alone": {"labels": True, "alpha": 0.0},
    "one point": {"N": 1, "K": 2},
    "no points": {"N": 0, "labels": True, "alpha": 0.5},
    "one token": {"V": 1, "plain": True},
    "blocks": {"N": 700, "V": 60, "d_s": 9, "weights": "mask", "K": 2},
}


def checks(quick: bool = False) -> Iterator[Check]:
    """All that can run on this machine."""
    for row in backends.TABLE:
        if row.op != OP:
            continue
        for device in devices(row):
            for dtype in row.dtypes:
                for divergence in DIVERGENCES:
                    yield from cases(row.backend, row.methods[0], device, dtype, divergence, quick)


def cases(backend: str, method: str, device: str, dtype: torch.dtype, divergence: str, quick: bool) -> Iterator[Check]:
    """The cases of one implementation, dtype and divergence."""
    # A program of Triton's works on one point, and its interpreter on one program at a time.
    fewer = {"N": FEWER} if quick and backend == "triton" and device == "cpu" else {}
    for name, case in (QUICK if quick else CASES).items():
        arguments = fewer | case
        if applies(divergence, dtype, arguments):
            full: dict[str, Any] = {"divergence": divergence, "dtype": dtype, "device": device} | arguments
            yield Check(OP, backend, method, device, dtype, divergence, name, partial(compare_case, full, backend))


def applies(divergence: str, dtype: torch.dtype, arguments: dict[str, Any]) -> bool:
    """Whether the exact loss is finite (KL(q ‖ p) is not where p is 0 and q is not), and the dtype holds the inputs."""
    if dtype is torch.float16 and arguments.get("regime") == "huge":
        return False
    certain = arguments.get("regime") in ("impossible", "one hot") or "top k" in arguments.get("given", "each")
    return divergence != "reverse_kl" or not certain or arguments.get("given") == "each"


def compare_case(arguments: dict[str, Any], backend: str) -> list[Deviation]:
    """Run one case and hold it to its budget."""
    inputs = make_inputs(**arguments)
    target, yardstick = expectations(tuple(sorted(arguments.items())))
    if backend == "triton" and arguments["device"] == "cpu":
        return deviations(interpreted(inputs, backend), target, yardstick)
    return deviations(ours(inputs, backend), target, yardstick)


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
    wide = inputs.dtype is torch.float64
    narrow = inputs.to(torch.float32) if wide else inputs
    target = exact(narrow)
    found = errors(eager(narrow), target)
    if inputs.options.get("reduction") != "none":
        with torch.no_grad():
            points, exact_points = (eager_pointwise(x, x.trained).double() for x in (narrow, narrow.to(torch.float64)))
        spread = (points - exact_points).abs().sum() / (target.loss.abs() or 1)
        found["loss"] = max(found["loss"], spread.item())
    return {name: error * FLOAT64_SHARE + FLOAT64_FLOOR if wide else error for name, error in found.items()}
