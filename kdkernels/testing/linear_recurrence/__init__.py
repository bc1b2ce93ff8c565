"""Inputs, checks and benchmark workloads of the diagonal linear recurrence."""

from kdkernels.testing.check import why_not
from kdkernels.testing.linear_recurrence.checks import checks
from kdkernels.testing.linear_recurrence.workloads import workloads

__all__ = ["checks", "why_not", "workloads"]
