"""Three ways to get Hankel singular values from PyTorch.

Square roots of both Gramians by eigh, then svdvals, is the accurate one. The Cholesky route and eig(PQ) lose the small
values, and where a Gramian is singular to working precision they fail.
"""

import torch
from torch import Tensor


def gramians(Lambda: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q."""
    denominator = 1 - Lambda.unsqueeze(-1) * Lambda.conj().unsqueeze(-2)
    return (B @ B.mH) / denominator, (C.mH @ C) / denominator.conj()


def eig(Lambda: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """sqrt(eig(PQ)), as CompreSSM has it; with gradients one by one, as its batched backward fails (torch 2.13)."""
    P, Q = gramians(Lambda, B, C)
    product = P @ Q
    parts = product.split(1) if product.requires_grad else (product,)
    return torch.cat([torch.linalg.eigvals(part).abs().sqrt() for part in parts])


def by_eigh(Lambda: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Singular values of Q^½ P^½."""
    P, Q = (root(gramian) for gramian in gramians(Lambda, B, C))
    return torch.linalg.svdvals(Q.mH @ P)


def root(gramian: Tensor) -> Tensor:
    """F with F Fᴴ = the Gramian, negative eigenvalues cut off."""
    values, vectors = torch.linalg.eigh(gramian)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def by_cholesky(Lambda: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Singular values of the Cholesky factors' product."""
    P, Q = gramians(Lambda, B, C)
    return torch.linalg.svdvals(torch.linalg.cholesky_ex(Q)[0].mH @ torch.linalg.cholesky_ex(P)[0])
