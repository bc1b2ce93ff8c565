"""Inputs, checks and benchmark workloads of projection alignment."""

from kdkernels.testing.check import why_not
from kdkernels.testing.projection_alignment.checks import checks
from kdkernels.testing.projection_alignment.workloads import workloads

__all__ = ["checks", "why_not", "workloads"]
