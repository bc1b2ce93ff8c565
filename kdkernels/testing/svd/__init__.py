"""Inputs, checks and benchmark workloads of singular value decompositions."""

from kdkernels.testing.check import why_not
from kdkernels.testing.svd.checks import checks
from kdkernels.testing.svd.workloads import workloads

__all__ = ["checks", "why_not", "workloads"]
