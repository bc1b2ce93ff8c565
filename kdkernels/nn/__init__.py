"""Thin modules over the operators."""

from kdkernels.nn.heads import head_of
from kdkernels.nn.linear_distillation import LinearDistillation
from kdkernels.nn.lora_linear import LoRALinear
from kdkernels.nn.projection_alignment import FrozenProjection, ProjectionAlignment, resample_frames

__all__ = [
    "FrozenProjection",
    "LinearDistillation",
    "LoRALinear",
    "ProjectionAlignment",
    "head_of",
    "resample_frames",
]
