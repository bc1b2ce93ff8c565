"""kdkernels: accelerated, drop-in operators for model compression, each proved against plain PyTorch."""

from kdkernels import nn
from kdkernels.backend import explain, use_backend
from kdkernels.ops.hankel import (
    BalancedTruncation,
    GramianFactors,
    balanced_truncation,
    era,
    gramian_factors,
    hankel_energy,
    hankel_singular_values,
    hankel_svd,
)
from kdkernels.ops.linear_distillation import Head, TopKTeacher, linear_distillation_loss, topk_teacher
from kdkernels.ops.linear_recurrence import linear_recurrence
from kdkernels.ops.lora_linear import LoRA, lora_linear, lora_linear_group
from kdkernels.ops.projection_alignment import projection_alignment_loss
from kdkernels.ops.svd import SVD, svd, svdvals

__version__ = "0.1.0"
__all__ = [
    "SVD",
    "BalancedTruncation",
    "GramianFactors",
    "Head",
    "LoRA",
    "TopKTeacher",
    "__version__",
    "balanced_truncation",
    "era",
    "explain",
    "gramian_factors",
    "hankel_energy",
    "hankel_singular_values",
    "hankel_svd",
    "linear_distillation_loss",
    "linear_recurrence",
    "lora_linear",
    "lora_linear_group",
    "nn",
    "projection_alignment_loss",
    "svd",
    "svdvals",
    "topk_teacher",
    "use_backend",
]
