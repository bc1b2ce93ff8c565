"""Who multiplies large matrices on the CPU: torch (the vendor's library), or our own packed product.

Our product carries whatever joins it (an adapter, a dropout mask) at no pass of its own and gives the same bits for any
number of threads. But it multiplies in float32: where the processor has bfloat16 arithmetic the vendor's is far faster,
and on Intel's MKL reached 290 GFLOP/s in float32 (Emerald Rapids, two cores) where ours reached 220.
"""

import os
from functools import cache

import torch

from kdkernels import _native

VARIABLE = "KDKERNELS_GEMM"
CHOICES = ("auto", "vendor", "own")

FORCED = os.environ.get(VARIABLE) or "auto"
SMALL = 2**21  # multiply-adds below which a call of its own costs more than a faster product saves


def vendor_multiplies(dtype: torch.dtype, size: int = 2**62) -> bool:
    """Whether products of matrices of this dtype, of `size` multiply-adds, are torch's.

    KDKERNELS_GEMM=vendor or own decides otherwise; ValueError where the variable holds anything else.
    """
    if FORCED == "auto":
        if dtype is torch.bfloat16:
            return _multiplies_bfloat16()
        return size >= SMALL and _processor() == "intel" and torch.backends.mkl.is_available()
    if FORCED not in CHOICES:
        raise ValueError(f"{VARIABLE} is {FORCED!r}, but must be one of {', '.join(map(repr, CHOICES))}")
    return FORCED == "vendor"


@cache
def _multiplies_bfloat16() -> bool:
    """torch says so of every AVX-512, where oneDNN emulates it."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and _native.module().multiplies_bfloat16()


@cache
def _processor() -> str:
    return _native.module().processor()
