"""Thin modules over the operators."""

from kdkernels.nn.lora_linear import LoRALinear
from kdkernels.nn.projection_alignment import FrozenProjection, ProjectionAlignment, resample_frames

__all__ = ["FrozenProjection", "LoRALinear", "ProjectionAlignment", "resample_frames"]
