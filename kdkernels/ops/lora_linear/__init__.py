"""A linear layer with a low-rank adapter, and siblings that share their input."""

from kdkernels.ops.lora_linear.api import lora_linear, lora_linear_group
from kdkernels.ops.lora_linear.call import LoRA

__all__ = ["LoRA", "lora_linear", "lora_linear_group"]
