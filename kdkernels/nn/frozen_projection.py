"""Projections that are drawn from a seed, not learned, and never stored."""

import torch
from torch import Tensor

from kdkernels.contract import is_whole


class FrozenProjection(torch.nn.Module):
    """The weight of a projection that is drawn, not learned, and kept out of the `state_dict`."""

    weight: Tensor
    bias = None

    def __init__(
        self, d: int, D: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(D, d, device=device, dtype=dtype), persistent=False)

    def extra_repr(self) -> str:
        D, d = self.weight.shape
        return f"in_features={d}, out_features={D}"


def draw_projection(kind: str, D: int, d: int, generator: torch.Generator) -> Tensor:
    """(D, d), float64: drawn in one dtype, so that a seed means the same matrix in every dtype."""

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")

    if kind == "johnson_lindenstrauss":
        return normal(D, d) / D**0.5
    Q, R = torch.linalg.qr(normal(max(D, d), min(D, d)))
    Q = Q * R.diagonal().sign()  # without it, Q is not uniformly distributed (Mezzadri)
    return Q if d <= D else Q.mT


def check_seed(seed: object) -> None:
    """Raise unless torch's generators take it."""
    if not is_whole(seed):
        raise TypeError(f"seed is {seed!r}, but must be a whole number")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, but must be at least -2**63 and below 2**64")
