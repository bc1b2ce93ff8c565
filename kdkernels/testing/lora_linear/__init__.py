"""Inputs, checks and benchmark workloads of linear layers with adapters."""

from kdkernels.testing.check import why_not
from kdkernels.testing.lora_linear.checks import checks
from kdkernels.testing.lora_linear.workloads import workloads

__all__ = ["checks", "why_not", "workloads"]
