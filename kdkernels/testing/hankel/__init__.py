"""Inputs, checks and benchmark workloads of Gramian factors and Hankel singular values."""

from kdkernels.testing.check import why_not
from kdkernels.testing.hankel.checks import checks
from kdkernels.testing.hankel.workloads import workloads

__all__ = ["checks", "why_not", "workloads"]
