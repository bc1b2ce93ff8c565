"""Projection alignment: student and teacher points mapped into one space and compared there."""

from kdkernels.ops.projection_alignment.api import projection_alignment_loss

__all__ = ["projection_alignment_loss"]
