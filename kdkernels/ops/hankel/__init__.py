"""Gramian factors and Hankel singular values of diagonal state-space models, and what follows from them."""

from kdkernels.ops.hankel import costs as _costs  # noqa: F401, for kd.explain
from kdkernels.ops.hankel.api import GramianFactors, gramian_factors, hankel_energy, hankel_singular_values
from kdkernels.ops.hankel.realization import era, hankel_svd
from kdkernels.ops.hankel.truncation import BalancedTruncation, balanced_truncation

__all__ = [
    "BalancedTruncation",
    "GramianFactors",
    "balanced_truncation",
    "era",
    "gramian_factors",
    "hankel_energy",
    "hankel_singular_values",
    "hankel_svd",
]
