"""Inputs, checks and benchmark workloads of Gramian factors, Hankel singular values and the models they lead to."""

from collections.abc import Iterator

from kdkernels.testing.check import Check, why_not
from kdkernels.testing.hankel import checks as values
from kdkernels.testing.hankel import models
from kdkernels.testing.hankel import workloads as cases

__all__ = ["checks", "why_not", "workloads"]


def checks(quick: bool = False) -> Iterator[Check]:
    """What `validate` runs."""
    yield from values.checks(quick)
    yield from models.checks()


def workloads(quick: bool = False, device: str = "cpu") -> list[cases.Workload | models.Workload]:
    """What `bench` times."""
    return [*cases.workloads(quick, device), *models.workloads(quick)]
