"""Which backend a run is served by."""

from typing import Any

import torch

import kdkernels as kd
from kdtrainer.errors import RunError


def serving_backend(backend: str) -> str:
    """The one that `backend`, an option, means on this machine."""
    try:
        return explanation(backend).backend
    except (ImportError, ValueError) as error:
        raise RunError(f"--backend {backend} cannot be had: {error}") from error


def explanation(backend: str) -> Any:
    point, projection = torch.empty(1, 2), torch.empty(3, 2)
    return kd.explain(kd.projection_alignment_loss, point, point, projection, projection, backend=backend)
