"""kdkernels: accelerated, drop-in operators for model compression, each proved against plain PyTorch."""

from kdkernels import nn
from kdkernels.backend import explain, use_backend
from kdkernels.ops.projection_alignment import projection_alignment_loss

__version__ = "0.1.0"
__all__ = ["__version__", "explain", "nn", "projection_alignment_loss", "use_backend"]
