"""A linear classifier in a small subspace of the features (subspace-native distillation, arXiv 2512.23410)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.contract import autocast_dtype, check_choice, check_count, check_tensor, show
from kdkernels.nn.frozen_projection import FrozenProjection, check_seed, draw_projection

PROJECTIONS = ("johnson_lindenstrauss", "pca", "learned")


class SubspaceHead(nn.Module):
    """Classes from a k-dimensional view of d-dimensional features: z = R h, logits = W z + b.

    The features are a frozen teacher's, and W (V, k) is k/d of a full head's (arXiv 2512.23410). A student that makes z
    itself, aligned with R h, needs neither h nor R, and shares W and b: by
    `kdkernels.projection_alignment_loss(z, h, None, head.R, teacher_bias=head.offset)` it learns to, without labels.

    Args:
        features: d.
        subspace: k, at most d.
        classes: V.
        projection: where R is from:

            - `"johnson_lindenstrauss"`: entries from N(0, 1/k), which keep inner products in expectation. Drawn from
              `seed` on the CPU, by a generator of its own, the same matrix in every dtype and the one that a
              `ProjectionAlignment` with this seed has for its first teacher layer. R is never stored: the `state_dict`
              holds the seed, and a head that loads one draws that seed's R.
            - `"pca"`: the k leading principal directions of features that `fit` is given, of which it removes the
              mean μ too, z = R (h − μ); both are buffers.
            - `"learned"`: a parameter, trained with W.
        bias: whether there is b.
        seed: of R, where it is drawn.
        device, dtype: of R, W and b; any floating-point dtype.

    Attributes:
        classifier: W and b, a `torch.nn.Linear`, from which `kdkernels.nn.head_of` makes a `Head`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        features: int,
        subspace: int,
        classes: int,
        *,
        projection: str = "johnson_lindenstrauss",
        bias: bool = True,
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("features", features), ("subspace", subspace), ("classes", classes)):
            check_count(name, count)
        if subspace > features:
            raise ValueError(f"subspace is {subspace}, but must be at most features, {features}")
        check_choice("projection", projection, PROJECTIONS)
        check_seed(seed)
        self.features, self.subspace, self.classes = int(features), int(subspace), int(classes)
        self.projection = projection
        d, k, options = self.features, self.subspace, {"device": device, "dtype": dtype}
        self.map: nn.Linear | SeededProjection | PrincipalProjection
        if projection == "learned":
            self.map = nn.Linear(d, k, bias=False, **options)
        elif projection == "pca":
            self.map = PrincipalProjection(d, k, **options)
        else:
            self.map = SeededProjection(d, k, seed, **options)
        self.classifier = nn.Linear(k, self.classes, bias=bias, **options)

    @property
    def R(self) -> Tensor:
        """(k, d), of the dtype and on the device of the head. RuntimeError: `"pca"`, and not fitted."""
        if isinstance(self.map, PrincipalProjection):
            self.map.check_fitted()
        return self.map.weight

    @property
    def offset(self) -> Tensor | None:
        """What z has beside R h: −R μ (k) of `"pca"`, otherwise None."""
        return -(self.R @ self.map.mean) if isinstance(self.map, PrincipalProjection) else None

    @property
    def seed(self) -> int | None:
        """Of R, where it is drawn."""
        return self.map.seed if isinstance(self.map, SeededProjection) else None

    def reset_parameters(self) -> None:
        """Draw W, b and a learned R anew, from torch's generator; a drawn R again from its seed. A fit stays."""
        self.classifier.reset_parameters()
        if not isinstance(self.map, PrincipalProjection):
            self.map.reset_parameters()

    def fit(self, features: Tensor) -> "SubspaceHead":
        """Take μ and R from features: `"pca"` alone.

        The directions are eigenvectors of the covariance, in float64 whatever the dtype, the leading one first, and of
        the sign that makes the largest entry of each positive.

        Args:
            features: (..., d), more than k points, all finite. They need neither the dtype nor the device of the head.

        Returns:
            The head itself.

        Raises:
            TypeError: features is no floating-point tensor.
            ValueError: it does not fit, or nothing is to be fitted.
        """
        if not isinstance(self.map, PrincipalProjection):
            raise ValueError(f"projection is {self.projection!r}, but must be 'pca' for fit")
        self._check("features", features, self.features)
        points = features.detach().reshape(-1, self.features)  # (N, d)
        if len(points) <= self.subspace:
            raise ValueError(f"features has {len(points)} points, but must have more than subspace, {self.subspace}")
        if not points.isfinite().all():
            raise ValueError("features holds numbers that are not finite")
        self.map.fit(points)
        return self

    def project(self, features: Tensor) -> Tensor:
        """(..., d) -> z (..., k), differentiable.

        Raises:
            TypeError: features is no floating-point tensor, or, without autocast, not of the head's dtype.
            ValueError: its last dimension is not d.
            RuntimeError: the projection is `"pca"` and was not fitted.
        """
        self._check("features", features, self.features, self.R)
        return self.map(features)

    def from_projected(self, projected: Tensor) -> Tensor:
        """z (..., k), a student's or `project`'s, -> logits (..., V). Raises as `project` does."""
        self._check("projected", projected, self.subspace, self.classifier.weight)
        return self.classifier(projected)

    def forward(self, features: Tensor) -> Tensor:
        """(..., d) -> logits (..., V). Raises as `project` does."""
        return self.from_projected(self.project(features))

    def extra_repr(self) -> str:
        shown = f"{self.features}, subspace={self.subspace}, classes={self.classes}, projection={self.projection!r}"
        return shown if self.seed is None else f"{shown}, seed={self.seed}"

    @staticmethod
    def _check(name: str, value: Tensor, width: int, weight: Tensor | None = None) -> None:
        check_tensor(name, value)
        if value.dim() == 0 or value.shape[-1] != width:
            raise ValueError(f"{name} has shape {show(value.shape)}, but must be (..., {width})")
        if weight is not None and value.dtype != weight.dtype and autocast_dtype(value) is None:
            raise TypeError(f"{name} has dtype {value.dtype}, but must have the head's, {weight.dtype}")


class SeededProjection(FrozenProjection):
    """R with entries from N(0, 1/k); its state is the seed alone."""

    def __init__(self, d: int, k: int, seed: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(d, k, device=device, dtype=dtype)
        self.seed = int(seed)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw R again."""
        k, d = self.weight.shape
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        self.weight.copy_(draw_projection("johnson_lindenstrauss", k, d, generator))

    def forward(self, features: Tensor) -> Tensor:
        """(..., d) -> (..., k)."""
        return F.linear(features, self.weight)

    def get_extra_state(self) -> Tensor:
        """A tensor, which safetensors stores too."""
        return torch.tensor(self.seed, dtype=torch.int64 if self.seed < 2**63 else torch.uint64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Draw the R of that seed."""
        self.seed = int(state.item())
        self.reset_parameters()


class PrincipalProjection(nn.Module):
    """z = R (h − μ), once it was fitted."""

    mean: Tensor
    weight: Tensor

    def __init__(self, d: int, k: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.fitted = False
        self.register_buffer("mean", torch.zeros(d, device=device, dtype=dtype))
        self.register_buffer("weight", torch.zeros(k, d, device=device, dtype=dtype))

    @torch.no_grad()
    def fit(self, points: Tensor) -> None:
        """Of (N, d) points."""
        mean = points.mean(0, dtype=torch.float64)
        centred = points - mean  # (N, d), float64
        directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors.mT.flip(0)[: len(self.weight)]  # (k, d)
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.mean.copy_(mean)
        self.weight.copy_(directions * largest.sign())
        self.fitted = True

    def check_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError("the projection is 'pca' and has no directions yet: call fit(features) first")

    def forward(self, features: Tensor) -> Tensor:
        """(..., d) -> (..., k)."""
        self.check_fitted()
        return F.linear(features - self.mean, self.weight)

    def get_extra_state(self) -> Tensor:
        """Whether there are directions; a tensor, which safetensors stores too."""
        return torch.tensor(self.fitted, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.fitted = bool(state.item())

    def extra_repr(self) -> str:
        k, d = self.weight.shape
        return f"in_features={d}, out_features={k}, fitted={self.fitted}"
