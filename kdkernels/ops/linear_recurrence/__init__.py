"""The diagonal linear recurrence h_t = λ ⊙ h_{t−1} + u_t."""

from kdkernels.ops.linear_recurrence.api import linear_recurrence

__all__ = ["linear_recurrence"]
