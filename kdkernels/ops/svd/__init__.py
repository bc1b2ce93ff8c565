"""Singular value decompositions of many small matrices."""

from kdkernels.ops.svd.api import SVD, svd, svdvals

__all__ = ["SVD", "svd", "svdvals"]
