"""Inputs, checks and benchmark workloads of the linear distillation loss."""

from kdkernels.testing.check import why_not
from kdkernels.testing.linear_distillation.checks import checks
from kdkernels.testing.linear_distillation.workloads import workloads

__all__ = ["checks", "why_not", "workloads"]
