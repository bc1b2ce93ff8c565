"""What `validate` runs: every implementation × dtype of layers with adapters, over all its cases."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from kdkernels import backend as backends
from kdkernels.testing.check import Check, devices, held_to_eager
from kdkernels.testing.compare import Deviation, Outcome, deviations
from kdkernels.testing.lora_linear.inputs import eager, exact, make_inputs, ours

OP = "lora_linear"

# Arguments of make_inputs by name; the `blocks` go past the blocks that implementations work in.
QUICK: dict[str, dict[str, Any]] = {
    "one layer": {},
    "frozen base": {"needs": ("input", "lora_A", "lora_B")},
    "first layer": {"needs": ("lora_A", "lora_B"), "bias": False},
    "three siblings": {"K": 3},
    "three on one base": {"K": 3, "shared": True, "needs": ("input", "lora_A", "lora_B")},
    "strided": {"strided": True, "N": 41, "d_in": 35},
    "blocks": {"N": 300, "d_in": 150, "d_out": 140, "r": 17},
}
CASES: dict[str, dict[str, Any]] = QUICK | {
    "rank 1": {"r": 1},
    "rank above the widths": {"r": 40, "d_in": 9, "d_out": 11},
    "three on one trained base": {"K": 3, "shared": True},
    "only the input": {"needs": ("input",)},
    "only lora_A": {"needs": ("lora_A",)},
    "only lora_B": {"needs": ("lora_B",)},
    "only the bias": {"needs": ("bias",)},
    "forward only": {"needs": ()},
    "one point": {"N": 1},
    "no points": {"N": 0},
    "width 1": {"d_in": 1, "d_out": 1, "r": 1},
    "blocks of width": {"N": 9, "d_in": 1100, "d_out": 30, "r": 6, "K": 2},
    "blocks of points": {"N": 1100, "d_in": 20, "d_out": 18, "r": 3, "K": 2, "shared": True},
}
# variants: dropout or none; adapters as the base, or in float32 beside a narrower one
VARIANTS: dict[str, dict[str, Any]] = {
    "p=0": {},
    "p=0.3": {"dropout_p": 0.3},
    "p=0.3, float32 adapters": {"dropout_p": 0.3, "adapter_dtype": torch.float32},
}
# "blocks" in Triton's interpreter, where it takes seconds: each variant with 32 bits, and with 16 by one dtype of them.
INTERPRETED = {
    torch.float32: ("p=0", "p=0.3"),
    torch.bfloat16: ("p=0",),
    torch.float16: ("p=0.3", "p=0.3, float32 adapters"),
}


def checks(quick: bool = False) -> Iterator[Check]:
    """All that can run on this machine."""
    for row in backends.TABLE:
        if row.op != OP:
            continue
        for device in devices(row):
            fewer = INTERPRETED if quick and row.backend == "triton" and device == "cpu" else {}
            for dtype in row.dtypes:
                for variant, options in VARIANTS.items():
                    if "adapter_dtype" in options and dtype.itemsize >= 4:
                        continue
                    for name, arguments in (QUICK if quick else CASES).items():
                        if fewer and name == "blocks" and variant not in fewer[dtype]:
                            continue
                        full = {"dtype": dtype, "device": device} | options | arguments
                        compare = partial(compare_case, full, row.backend)
                        yield Check(OP, row.backend, row.methods[0], device, dtype, variant, name, compare)


def compare_case(arguments: dict[str, Any], backend: str) -> list[Deviation]:
    """Run one case and hold it to its budget."""
    target, yardstick = expectations(tuple(sorted(arguments.items(), key=lambda item: item[0])))
    return deviations(ours(make_inputs(**arguments), backend), target, yardstick)


@cache
def expectations(arguments: tuple[tuple[str, Any], ...]) -> tuple[Outcome, dict[str, float]]:
    """The float64 answer of a case, and the errors it allows."""
    return held_to_eager(make_inputs(**dict(arguments)), exact, eager)
