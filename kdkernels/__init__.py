"""kdkernels: accelerated, drop-in operators for model compression, each proved against plain PyTorch."""

from kdkernels import nn
from kdkernels.backend import explain, use_backend
from kdkernels.ops.lora_linear import LoRA, lora_linear, lora_linear_group
from kdkernels.ops.projection_alignment import projection_alignment_loss

__version__ = "0.1.0"
__all__ = [
    "LoRA",
    "__version__",
    "explain",
    "lora_linear",
    "lora_linear_group",
    "nn",
    "projection_alignment_loss",
    "use_backend",
]
