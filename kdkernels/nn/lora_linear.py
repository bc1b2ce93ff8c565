"""A linear layer with a low-rank adapter, as a module."""

from math import isfinite, sqrt
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter, init

from kdkernels.backend import ANY_DTYPE, BACKENDS
from kdkernels.contract import check_choice, check_count
from kdkernels.ops.lora_linear import lora_linear
from kdkernels.ops.lora_linear.reference import accumulation_dtype


class LoRALinear(torch.nn.Module):
    """A frozen linear layer and a trained low-rank adapter beside it: y = x Wᵀ + b + scaling · (x̂ Aᵀ) Bᵀ.

    x̂ is the input after dropout while training, and the input while evaluating; see `kdkernels.lora_linear`. B starts
    at zero, so a new adapter changes nothing. `LoRALinear.from_linear` adapts a layer that exists.

    Args:
        in_features: d_in.
        out_features: d_out.
        rank: r.
        alpha: numerator of the scaling, finite; `rank` when None.
        dropout: probability p of the adapter's dropout, at least 0 and below 1.
        bias: the layer has a bias (frozen, like the weight).
        rslora: scaling is alpha / √r (arXiv 2312.03732) in place of alpha / r.
        backend: as in `lora_linear`.
        device: of all parameters.
        dtype: of the weight and the bias, and of the input that `forward` takes.
        adapter_dtype: of lora_A and lora_B; `dtype` when None. float32 beside a bfloat16 base is usual.

    Attributes:
        weight, bias: (d_out, d_in) and (d_out,) or None; they require no gradient until told to.
        lora_A, lora_B: (r, d_in) and (d_out, r).
        scaling: alpha / r or alpha / √r.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    weight: Tensor
    bias: Tensor | None
    base_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        rslora: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            check_count(name, count)
        if alpha is not None and not (_is_number(alpha) and isfinite(alpha)):
            raise ValueError(f"alpha is {alpha!r}, but must be a finite number, or None for the rank")
        if not (_is_number(dropout) and 0 <= dropout < 1):
            raise ValueError(f"dropout is {dropout!r}, but must be a number of at least 0 and below 1")
        for name, flag in (("bias", bias), ("rslora", rslora)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}, but must be True or False")
        check_choice("backend", backend, BACKENDS)
        _check_device(device)
        for name, kind in (("dtype", dtype), ("adapter_dtype", adapter_dtype)):
            if kind is not None and kind not in ANY_DTYPE:
                raise ValueError(f"{name} is {kind!r}, but must be one of {', '.join(map(str, ANY_DTYPE))}, or None")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.alpha = float(rank if alpha is None else alpha)
        self.scaling = self.alpha / (sqrt(rank) if rslora else rank)
        self.dropout = float(dropout)
        self.rslora = rslora
        self.backend = backend

        def room(*shape: int, dtype: torch.dtype | None, trained: bool) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=trained)

        self.weight = room(out_features, in_features, dtype=dtype, trained=False)
        self.bias = room(out_features, dtype=dtype, trained=False) if bias else None
        self.lora_A = room(rank, in_features, dtype=adapter_dtype or dtype, trained=True)
        self.lora_B = room(out_features, rank, dtype=adapter_dtype or dtype, trained=True)
        self.register_buffer("base_weight", None, persistent=False)  # while merged: the weight without the adapter
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        backend: str = "auto",
        adapter_dtype: torch.dtype | None = None,
        train_base: bool = False,
    ) -> "LoRALinear":
        """An adapter on `linear`, whose very `weight` and `bias` become this module's.

        Args:
            linear: the layer; its parameters are shared, not copied, and so frozen there too.
            train_base: weight and bias are trained beside the adapter. Else they require no gradient any more.
            rank, alpha, dropout, rslora, backend, adapter_dtype: as in the constructor.

        Raises:
            TypeError: `linear` is no `torch.nn.Linear`, or its weight is computed (a parametrization) and not held.
            ValueError: as the constructor does.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear is {type(linear).__name__}, but must be a torch.nn.Linear")
        weight, bias = linear.weight, linear.bias
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and not isinstance(value, Parameter):
                raise TypeError(f"linear.{name} is {type(value).__name__}, but must be a torch.nn.Parameter")
        if not isinstance(train_base, bool):
            raise ValueError(f"train_base is {train_base!r}, but must be True or False")
        # on the meta device, for the base is there already and would be drawn for nothing
        layer = cls(
            linear.in_features, linear.out_features, rank, alpha=alpha, dropout=dropout, bias=bias is not None,
            rslora=rslora, backend=backend, device="meta", dtype=weight.dtype, adapter_dtype=adapter_dtype,
        )  # fmt: skip
        layer.weight, layer.bias = weight, bias
        for base in (weight, bias):
            if base is not None:
                base.requires_grad_(train_base)
        layer.lora_A = Parameter(torch.empty_like(layer.lora_A, device=weight.device))
        layer.lora_B = Parameter(torch.empty_like(layer.lora_B, device=weight.device))
        layer.reset_adapter()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Draw the base anew, as `torch.nn.Linear` does, and the adapter. Raises RuntimeError while merged."""
        self.reset_adapter()
        init.kaiming_uniform_(self.weight, a=sqrt(5))
        if self.bias is not None:
            bound = 1 / sqrt(self.in_features)
            init.uniform_(self.bias, -bound, bound)

    def reset_adapter(self) -> None:
        """Draw lora_A anew and set lora_B to zero, as PEFT does. Raises RuntimeError while merged."""
        if self.merged:
            raise RuntimeError("the adapter is merged: call unmerge() before it is reset")
        init.kaiming_uniform_(self.lora_A, a=sqrt(5))
        init.zeros_(self.lora_B)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out), in the input's dtype, which must be the weight's.

        While merged this is the plain linear layer: no dropout, and no gradient for the adapter.
        """
        if self.merged:
            return F.linear(input, self.weight, self.bias)
        return lora_linear(
            input,
            self.weight,
            self.lora_A,
            self.lora_B,
            bias=self.bias,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the adapter too."""
        return self.base_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add scaling · B A to `weight` in place, rounded once. A copy of the weight is kept for `unmerge`.

        Raises RuntimeError where the adapter is merged already: it would be added twice.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged already: call unmerge() first")
        wide = accumulation_dtype(self.weight.dtype)
        merged = torch.addmm(self.weight.to(wide), self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scaling)
        self.base_weight = self.weight.detach().clone()
        self.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give `weight` the bits it had before `merge`, in place. Raises RuntimeError where nothing is merged."""
        if self.base_weight is None:
            raise RuntimeError("the adapter is not merged: there is nothing to undo")
        self.weight.copy_(self.base_weight)
        self.base_weight = None

    def extra_repr(self) -> str:
        shown = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"rank={self.rank}"]
        shown += [f"alpha={self.alpha:g}", f"dropout={self.dropout:g}", f"bias={self.bias is not None}"]
        shown += [f"{name}=True" for name in ("rslora", "merged") if getattr(self, name)]
        shown += [f"backend={self.backend!r}"] if self.backend != "auto" else []
        return ", ".join(shown)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        """The weight without the adapter, merged or not: who loads it would add the adapter a second time."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.base_weight

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        """Refuse while merged: `weight` would be the base that is loaded, and `unmerge` would put back another."""
        if self.merged:
            errors.append(f"{prefix.rstrip('.') or 'the module'} is merged: call unmerge() before it is loaded")
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_device(device: object) -> None:
    try:
        torch.device("cpu" if device is None else device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device is {device!r}, but must be a torch.device, its name, or None") from None
