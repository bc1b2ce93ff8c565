"""What tests, benchmarks and `python -m kdkernels validate` share. Nothing here is imported by the operators.

Each family of operators has a folder with `checks(quick)`, which `validate` runs, and `workloads(quick, device)`, which
`bench` times; each check and workload says which operator it is of.
"""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

SUITES = {
    "projection_alignment_loss": "kdkernels.testing.projection_alignment",
    "linear_distillation_loss": "kdkernels.testing.linear_distillation",
    "lora_linear": "kdkernels.testing.lora_linear",
    "linear_recurrence": "kdkernels.testing.linear_recurrence",
    "svd": "kdkernels.testing.svd",
    "svdvals": "kdkernels.testing.svd",
    "gramian_factors": "kdkernels.testing.hankel",
    "hankel_singular_values": "kdkernels.testing.hankel",
    "hankel_energy": "kdkernels.testing.hankel",
    "balanced_truncation": "kdkernels.testing.hankel",
    "hankel_svd": "kdkernels.testing.hankel",
    "era": "kdkernels.testing.hankel",
}


def operators(name: str) -> list[str]:
    """The operator of that name, or all of the family: `hankel`."""
    return [name] if name in SUITES else [op for op, module in SUITES.items() if module.endswith(f".{name}")]


def names() -> list[str]:
    """What `operators` knows."""
    return sorted({*SUITES, *(module.rpartition(".")[2] for module in SUITES.values())})


def suite(op: str) -> ModuleType:
    """The folder that checks and measures `op`."""
    return import_module(SUITES[op])


def checks(op: str, quick: bool = False) -> Iterator[Any]:
    """What `validate` runs for `op`."""
    return (check for check in suite(op).checks(quick) if check.op == op)


def workloads(op: str, quick: bool = False, device: str = "cpu") -> list[Any]:
    """What `bench` times for `op`: sizes that a device of this type can fill."""
    return [workload for workload in suite(op).workloads(quick, device) if workload.op == op]
