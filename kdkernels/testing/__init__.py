"""What tests, benchmarks and `python -m kdkernels validate` share. Nothing here is imported by the operators.

Each operator has a folder with `checks(quick)`, which `validate` runs, and `workloads(quick)`, which `bench` times.
"""

from importlib import import_module
from types import ModuleType

SUITES = {
    "projection_alignment_loss": "kdkernels.testing.projection_alignment",
    "lora_linear": "kdkernels.testing.lora_linear",
}


def suite(op: str) -> ModuleType:
    """The folder that checks and measures `op`."""
    return import_module(SUITES[op])
