"""What `validate` runs: every implementation × dtype of the recurrence, over all its cases."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from kdkernels import backend as backends
from kdkernels.ops.linear_recurrence import block
from kdkernels.testing.check import FLOAT64_FLOOR, FLOAT64_SHARE, Check, devices, held_to_eager
from kdkernels.testing.compare import Deviation, Outcome, deviations, errors, incoming
from kdkernels.testing.linear_recurrence.inputs import eager, exact, make_inputs, ours

OP = "linear_recurrence"

# Arguments of make_inputs by name; sizes go past the blocks of states, of steps and of sequences that kernels work in.
QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "own λ, initial state, reverse": {"own": True, "initial": True, "reverse": True},
    "cut in time": {"N": 2, "T": 261, "n": 3, "initial": True, "radii": (0.9, 0.999)},  # GPUs cut it
    "near the circle": {"N": 1, "T": 120, "n": 40, "radii": (0.99, 0.999)},
    "a vector and a part": {"n": 9, "initial": True, "T": 70},
    "strided": {"strided": True, "reverse": True},
    "many sequences": {"N": 130, "T": 5, "n": 3, "initial": True},
}
CASES: dict[str, dict[str, Any]] = QUICK | {
    "one step": {"T": 1, "initial": True},
    "one state": {"n": 1},
    "no steps": {"T": 0, "initial": True},
    "no sequences": {"N": 0},
    "no states": {"n": 0},
    "growing": {"radii": (1.0, 1.1)},
    "wide": {"n": 600, "T": 70, "N": 2},
    "long": {"n": 5, "T": 700, "N": 2, "radii": (0.99, 0.999)},
    "only λ": {"needs": ("Lambda",), "initial": True},
    "only the input": {"needs": ("input",)},
    "only the initial state": {"needs": ("initial_state",), "initial": True},
    "forward only": {"needs": ()},
}
# In Triton's interpreter, where it takes seconds, with one real dtype and one complex: the tests cut shorter sequences
# of the other two.
INTERPRETED = {"cut in time": (torch.float32, torch.complex128)}


def checks(quick: bool = False) -> Iterator[Check]:
    """All that can run on this machine."""
    for row in backends.TABLE:
        if row.op != OP:
            continue
        for device in devices(row):
            for dtype in row.dtypes:
                if dtype in (torch.bfloat16, torch.float16):  # computed in float32
                    continue
                fewer = INTERPRETED if quick and row.backend == "triton" and device == "cpu" else {}
                for name, arguments in (QUICK if quick else CASES).items():
                    if dtype not in fewer.get(name, (dtype,)):
                        continue
                    compare = partial(compare_case, {"dtype": dtype, "device": device} | arguments, row.backend)
                    yield Check(OP, row.backend, row.methods[0], device, dtype, "scan", name, compare)
                if (row.backend, device) == ("native", "cpu") and not dtype.is_complex:
                    for features in (3, 8) if quick else (2, 3, 8, block.MOST):
                        compare = partial(compare_block, features, dtype)
                        yield Check(OP, "native", "scan", device, dtype, "block", f"{features} features", compare)


def compare_case(arguments: dict[str, Any], backend: str) -> list[Deviation]:
    """Run one case and hold it to its budget."""
    target, yardstick = expectations(tuple(sorted(arguments.items(), key=lambda item: item[0])))
    return deviations(ours(make_inputs(**arguments), backend), target, yardstick)


def compare_block(features: int, dtype: torch.dtype) -> list[Deviation]:
    """The kernels around the recurrence of a block: rows that end within a tile, and masks of their sequences."""
    draw = torch.Generator().manual_seed(0)
    H, rows = features, (3, 47, features)
    names = ("x", "y", "u", "D", "value", "value_bias", "gate", "gate_bias", "weight", "bias")
    shapes = (rows, rows, rows, (H,), (H, H), (H,), (H, H), (H,), (H,), (H,))
    numbers = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    masks = [(torch.rand(3, 1, H, generator=draw, dtype=torch.float64) > 0.2) / 0.8 for _ in range(2)]

    def run(mix: Any, norm: Any, dtype: torch.dtype) -> Outcome:
        leaves = [x.to(dtype).requires_grad_() for x in numbers]
        mixed = mix(*leaves[:8], *(x.to(dtype) for x in masks))
        normed = norm(leaves[0], *leaves[8:], 1e-5)
        grads = torch.autograd.grad((mixed, normed), leaves, (incoming(mixed), incoming(normed)))
        return Outcome(mixed.detach(), dict(zip(names, grads, strict=True)), "mixed", {"normed": normed.detach()})

    plain = block.composed_mix, block.composed_norm
    target = run(*plain, torch.float64)
    yardstick = errors(run(*plain, torch.float32), target)
    if dtype is torch.float64:
        yardstick = {name: error * FLOAT64_SHARE + FLOAT64_FLOOR for name, error in yardstick.items()}
    # single numbers, and sums that cancel, are luck in one run of eager
    floor = 32 * torch.finfo(dtype).eps
    yardstick = {name: max(error, floor) for name, error in yardstick.items()}
    return deviations(run(block.mix, block.norm, dtype), target, yardstick)


@cache
def expectations(arguments: tuple[tuple[str, Any], ...]) -> tuple[Outcome, dict[str, float]]:
    """The float64 answer of a case, and the errors it allows."""
    return held_to_eager(make_inputs(**dict(arguments)), exact, eager)
