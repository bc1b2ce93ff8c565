"""Who multiplies large matrices on the CPU: torch (the vendor's library), or our own packed product.

Our product carries whatever joins it (an adapter, a dropout mask) at no pass of its own and gives the same bits for any
number of threads. It multiplies in float32: where the processor has bfloat16 arithmetic, the vendor's is far faster.
"""

import os
from functools import cache

import torch

VARIABLE = "KDKERNELS_GEMM"
CHOICES = ("auto", "vendor", "own")


def vendor_multiplies(dtype: torch.dtype) -> bool:
    """Whether products of matrices of this dtype are torch's; KDKERNELS_GEMM=vendor or own decides otherwise.

    Raises ValueError where the variable holds anything else.
    """
    forced = os.environ.get(VARIABLE) or "auto"
    if forced not in CHOICES:
        raise ValueError(f"{VARIABLE} is {forced!r}, but must be one of {', '.join(map(repr, CHOICES))}")
    return forced == "vendor" or (forced == "auto" and dtype is torch.bfloat16 and _multiplies_bfloat16())


@cache
def _multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
