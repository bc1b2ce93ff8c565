"""Thin modules over the operators."""

from kdkernels.nn.frozen_projection import FrozenProjection
from kdkernels.nn.heads import head_of
from kdkernels.nn.linear_distillation import LinearDistillation
from kdkernels.nn.lora_linear import LoRALinear
from kdkernels.nn.lru import LRU, LRUBlock, LRUClassifier
from kdkernels.nn.projection_alignment import ProjectionAlignment, resample_frames
from kdkernels.nn.subspace_head import SubspaceHead
from kdkernels.nn.truncation import TruncatedLayer, Truncation, keep_states, truncate

__all__ = [
    "LRU",
    "FrozenProjection",
    "LRUBlock",
    "LRUClassifier",
    "LinearDistillation",
    "LoRALinear",
    "ProjectionAlignment",
    "SubspaceHead",
    "TruncatedLayer",
    "Truncation",
    "head_of",
    "keep_states",
    "resample_frames",
    "truncate",
]
