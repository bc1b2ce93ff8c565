"""What `validate` runs: every implementation × dtype of Gramian factors and Hankel singular values, over all its cases.

Against the reference in float64, in norm. That every σ is right, the smallest too, is held against the same system in
other coordinates, which changes every pivot and no σ; the tests hold it against 50 digits.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import backend as backends
from kdkernels.ops.hankel import reference
from kdkernels.ops.hankel.kernel import kappa
from kdkernels.testing.check import Check, devices
from kdkernels.testing.compare import INCOMING, Deviation, relative_error
from kdkernels.testing.hankel.inputs import SSM, make_systems

OPS = ("gramian_factors", "hankel_singular_values", "hankel_energy")

# in norm, of σ and of gradients; and relative, of every σ
BUDGETS = {torch.float32: (1e-5, 1e-3), torch.float64: (1e-9, 1e-9)}

QUICK: dict[str, dict[str, Any]] = {
    "LRU, m=2": {"family": "LRU"},
    "mamba, m=1": {"family": "mamba", "m": 1},
    "clustered, m=1": {"family": "clustered", "m": 1},
    "near circle, m=8": {"family": "near circle", "m": 8},
    "m above n": {"n": 5, "m": 9, "p": 1},
    "horizon 37": {"horizon": 37},
    "output Re(Ch)": {"real_output": True, "n": 7},
}
CASES: dict[str, dict[str, Any]] = QUICK | {
    **{
        f"{family}, m={m}": {"family": family, "m": m}
        for family in ("mamba", "clustered", "near circle", "real", "conjugate pairs", "LRU")
        for m in (1, 2, 8)
    },
    "horizon 1": {"horizon": 1},
    "one state": {"n": 1},
    "no states": {"n": 0},
    "no systems": {"N": 0},
    "33 states": {"n": 33, "N": 5},
    "64 states": {"n": 64, "N": 9, "m": 3},
    "above the crossover": {"n": 110, "N": 3, "m": 4},
    "many": {"N": 70, "n": 9},
}


def checks(quick: bool = False) -> Iterator[Check]:
    """All that can run on this machine."""
    for row in backends.TABLE:
        if row.op not in OPS:
            continue
        for device in devices(row):
            for dtype in row.dtypes:
                for name, arguments in (QUICK if quick else CASES).items():
                    compare = partial(compare_case, row.op, dict(arguments), row.backend, dtype, device)
                    if not suits(row.op, arguments, dtype):
                        continue
                    yield Check(row.op, row.backend, row.methods[0], device, dtype, "batch", name, compare)


def suits(op: str, arguments: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether the operator has these options and the family this dtype."""
    options = "horizon" in arguments or "real_output" in arguments
    return (dtype.is_complex or arguments.get("family") in ("mamba", "real")) and not (
        op == "gramian_factors" and options
    )


def compare_case(op: str, arguments: dict[str, Any], backend: str, dtype: torch.dtype, device: str) -> list[Deviation]:
    """Run one case and hold it to its budget."""
    system, wide, options = drawn(arguments, dtype, device)
    if op == "gramian_factors":
        return compare_factors(system, backend)
    function = getattr(kd, op)
    budget, each = BUDGETS[system.B.real.dtype]
    target = expectations(op, tuple(sorted(arguments.items())), dtype, device)
    found = run(function, system, options | {"backend": backend})
    report = [Deviation(name, relative_error(found[name], x), budget) for name, x in target.items()]
    if op == "hankel_singular_values" and backend != "reference" and not options and system.B.shape[1] <= 64:
        other = function(*elsewhere(wide), backend=backend)
        report.append(Deviation("every σ", largest_error(found["value"], other), each))
    return report


def drawn(arguments: dict[str, Any], dtype: torch.dtype, device: str) -> tuple[SSM, SSM, dict[str, Any]]:
    """The systems of a case, in float64 too, and the operator's options."""
    options = {name: value for name, value in arguments.items() if name in ("horizon", "real_output")}
    shape = {name: value for name, value in arguments.items() if name not in options}
    system = make_systems(**shape, dtype=dtype, device=device)
    return system, system.to(torch.complex128 if dtype.is_complex else torch.float64), options


@cache
def expectations(op: str, arguments: tuple[tuple[str, Any], ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The reference's float64 answer of a case: the same for every implementation."""
    _, wide, options = drawn(dict(arguments), dtype, device)
    return run(getattr(kd, op), wide, options | {"backend": "reference"})


def run(function: Any, system: SSM, options: dict[str, Any]) -> dict[str, Tensor]:
    """The value, and the gradients of its sum times `INCOMING`."""
    leaves = system.leaves()
    value = function(*leaves, **options)
    grads = torch.autograd.grad(INCOMING * value.sum(), leaves)
    return {"value": value.detach()} | {f"grad {name}": g for name, g in zip(SSM._fields, grads, strict=True)}


def elsewhere(system: SSM) -> SSM:
    """The same system with its states in another order and in other units, powers of two."""
    n = system.Lambda.shape[-1]
    order = torch.arange(n - 1, -1, -1, device=system.Lambda.device)
    units = 2.0 ** (torch.arange(n, device=system.Lambda.device) % 5 - 2.0)
    return SSM(
        system.Lambda[:, order], system.B[:, order] * units[:, None].to(system.B.dtype), system.C[..., order] / units
    )


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Relative, over all values that the dtype holds."""
    smallest = 1e3 * torch.finfo(found.dtype).tiny
    found, exact = found.to(torch.float64), exact.to(torch.float64)
    if not found.numel():
        return 0.0
    error = (found - exact).abs() / exact.clamp(min=smallest) * (exact >= smallest)
    return float(error.nan_to_num(torch.inf).max())


def compare_factors(system: SSM, backend: str) -> list[Deviation]:
    """Each Gramian's error, its rows and columns scaled to a diagonal of 1, and that of its residuals."""
    budget = 100 * torch.finfo(system.B.real.dtype).eps
    wide = SSM(*map(reference.wide, system))
    found = kd.gramian_factors(*system, backend=backend)
    value, _ = kappa(wide.Lambda, None)
    gramians = {"P": (wide.B @ wide.B.mH) * value, "Q": (wide.C.mH @ wide.C) * value.conj()}
    report = []
    for (name, gramian), L, residual in zip(gramians.items(), found[:2], found[2:], strict=True):
        L, residual = reference.wide(L), reference.wide(residual)
        scale = gramian.diagonal(dim1=-2, dim2=-1).real.rsqrt()
        error = (L @ L.mH - gramian) * scale[..., :, None] * scale[..., None, :]
        report.append(Deviation(name, float(error.abs().max()) if error.numel() else 0.0, budget))
        trace = gramian.diagonal(dim1=-2, dim2=-1).real.sum(-1, keepdim=True)
        explained = torch.nn.functional.pad(L.abs().square().sum(-2).cumsum(-1), (1, 0))
        error = (trace - explained - residual).abs() / torch.where(trace > 0, trace, 1)
        report.append(Deviation(f"residual of {name}", float(error.max()) if error.numel() else 0.0, budget))
    return report
