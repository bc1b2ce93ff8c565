"""PEFT's LoRA layers, computed by `kdkernels.lora_linear`.

    handle = accelerate(model)  # a PeftModel, trained, saved and switched as before
    print(handle.report())  # the layers that stay on PEFT's own path, and why
    handle.undo()

A layer is accelerated by its class: `peft.tuners.lora.Linear` becomes `AcceleratedLinear`, which differs in `forward`
alone. Modules, parameters, hooks and the keys of the `state_dict` stay as they are, and copies of a layer (deepcopy,
pickle, the replicas of DataParallel) use their own parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from kdkernels.backend import BACKENDS, choose
from kdkernels.contract import check_choice
from kdkernels.ops.lora_linear import lora_linear

try:
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise ImportError("kdkernels.integrations.peft needs PEFT: pip install kdkernels[peft]") from error

BACKEND = "_kdkernels_backend"  # the attribute of a layer that says it is accelerated, and by which backend


class AcceleratedLinear(Linear):
    """PEFT's `lora.Linear`, computed by `lora_linear` in every call where that is the same function.

    It is never constructed: `accelerate` gives this class to layers that exist.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., d_in) -> (..., d_out), in the dtype of the base layer's output, as PEFT's own forward."""
        # Not super(): somebody may have kept this method from before the class was given back.
        if args or kwargs or _objection(self) or not _fits(self, x):
            return Linear.forward(self, x, *args, **kwargs)
        base = cast(nn.Linear, self.base_layer)
        first, *others = (_adapter(self, name) for name in _active(self))
        result = lora_linear(
            x,
            base.weight,
            first.lora_A.weight,
            first.lora_B.weight,
            bias=base.bias,
            scaling=first.scaling,
            dropout_p=first.dropout.p if isinstance(first.dropout, nn.Dropout) and first.dropout.training else 0.0,
            backend=self.__dict__[BACKEND],
        )
        dtype = result.dtype
        for other in others:
            x = self._cast_input_dtype(x, other.lora_A.weight.dtype)
            result = result + other.lora_B(other.lora_A(other.dropout(x))) * other.scaling
        return result.to(dtype)


class _Adapter(NamedTuple):
    lora_A: nn.Linear
    lora_B: nn.Linear
    dropout: nn.Module
    scaling: float


def _adapter(layer: Linear, name: str) -> _Adapter:
    modules = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    return _Adapter(*cast(tuple[nn.Linear, nn.Linear, nn.Module], modules), layer.scaling[name])


@dataclass(frozen=True)
class LayerReport:
    """One adapter layer of a model."""

    name: str  # as in `model.named_modules()`
    served: bool
    reason: str  # why it stays on PEFT's own path; empty when it is served


@dataclass(frozen=True)
class Report:
    """What is served and what is not: `str()` for people, `layers` for programs."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        left = [layer for layer in self.layers if not layer.served]
        lines = [f"{len(self.layers) - len(left)} of {len(self.layers)} adapter layers run on kdkernels.lora_linear"]
        return "\n".join(lines + [f"  {layer.name or '(the model)'}: {layer.reason}" for layer in left])


class Handle:
    """What `accelerate` did, and the way back. As a context manager it undoes on exit."""

    def __init__(self, model: nn.Module, layers: list[Linear]) -> None:
        self._model = model
        self._layers = layers

    def undo(self) -> None:
        """Give the layers that this handle accelerated back to PEFT, the same objects as before. Again: nothing."""
        while self._layers:
            _give_back(self._layers.pop())

    def report(self) -> Report:
        """The model's adapter layers as they stand now: merged, switched or new ones are seen."""
        return Report(tuple(_layer_reports(self._model)))

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def accelerate(model: nn.Module, *, backend: str = "auto") -> Handle:
    """Let `kdkernels.lora_linear` compute the LoRA layers of a PEFT model.

    Each call of a layer is served where `lora_linear` computes what PEFT would, and runs on PEFT's own path
    otherwise: DoRA and the other variants; a base layer or an adapter that is not exactly a `torch.nn.Linear` of
    plain tensors; `lora_bias`; `fan_in_fan_out`; hooks on a submodule, which then run; merged or disabled adapters;
    `adapter_names`; and, with `backend="auto"`, tensors that only the reference could serve. Of several active
    adapters the first is computed with the base layer, the others as PEFT does. Other kinds of adapter layers
    (Embedding, Conv, quantised ones) are left alone. `Handle.report` gives each layer's reason.

    A layer that is accelerated already stays as it is, with its backend and with the handle that accelerated it.
    Layers that PEFT adds later need another call. Copies of an accelerated model are accelerated; `restore` undoes
    that in a copy.

    What differs from PEFT: a dropout mask of the same distribution but other bits; sums in float32 that are rounded
    once; and, as `lora_linear` says, the accelerated backends are differentiable once, in reverse mode. For export
    to another format, undo.

    Args:
        model: a PeftModel, or any module that holds PEFT's adapter layers.
        backend: for `lora_linear`.

    Raises:
        TypeError: model is no module.
        ValueError: model has no adapter layers, or the backend is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, but must be a torch.nn.Module")
    check_choice("backend", backend, BACKENDS)
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(f"model, a {type(model).__name__}, has no PEFT layers: pass it after peft.get_peft_model")
    layers = [module for module in model.modules() if type(module) is Linear and not _replaced(module)]
    for layer in layers:
        layer.__class__ = AcceleratedLinear
        layer.__dict__[BACKEND] = backend
    return Handle(model, layers)


def restore(model: nn.Module) -> None:
    """Give every accelerated layer of `model` back to PEFT, whichever call accelerated it: for copies, and for all."""
    for module in model.modules():
        if isinstance(module, AcceleratedLinear):
            _give_back(module)


def _give_back(layer: Linear) -> None:
    ours = type(layer) is AcceleratedLinear  # or a subclass that somebody made of it: without BACKEND it does as PEFT
    layer.__dict__.pop(BACKEND, None)
    if ours:
        layer.__class__ = Linear


def _layer_reports(model: nn.Module) -> Iterator[LayerReport]:
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if isinstance(module, AcceleratedLinear) or type(module) is Linear:
            reason = _objection(module) or ""
        else:
            kind = type(module)
            reason = f"it is a {kind.__module__}.{kind.__qualname__}, not exactly a peft.tuners.lora.Linear"
        yield LayerReport(name, not reason, reason)


def _active(layer: Linear) -> list[str]:
    """The active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _objection(layer: Linear) -> str | None:
    """None when `lora_linear` computes what PEFT would for any input that `_fits`, else the reason."""
    if BACKEND not in layer.__dict__:
        return "its forward was replaced before accelerate()" if _replaced(layer) else "it is not accelerated"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "adapters are merged into its base layer"
    names = _active(layer)
    if not names:
        return "none of its adapters is active"
    for name in names:
        if name in layer.lora_variant:
            return f"adapter {name!r} is a variant of LoRA, {type(layer.lora_variant[name]).__name__}"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out is set"
    if _has_any_global_hook():
        return "there are hooks on all modules"
    return _objection_to_first(layer, names[0])


def _objection_to_first(layer: Linear, name: str) -> str | None:
    """About the modules whose place `lora_linear` takes; those of further adapters are called as ever."""
    base, (lora_A, lora_B, dropout, scaling) = cast(nn.Linear, layer.base_layer), _adapter(layer, name)
    for role, linear in (("base layer", base), ("lora_A", lora_A), ("lora_B", lora_B)):
        if type(linear) is not nn.Linear:
            return f"its {role} is a {type(linear).__name__}, not exactly a torch.nn.Linear"
        if type(linear.weight) not in (Tensor, nn.Parameter):
            return f"the weight of its {role} is a {type(linear.weight).__name__}, not a plain tensor"
    if lora_A.bias is not None or lora_B.bias is not None:
        return f"adapter {name!r} has a bias"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its lora_dropout is a {type(dropout).__name__}, not a torch.nn.Dropout"
    if isinstance(dropout, nn.Dropout) and (dropout.inplace or not 0 <= dropout.p < 1):
        return f"its lora_dropout is {dropout}"
    for role, module in (("base layer", base), ("lora_A", lora_A), ("lora_B", lora_B), ("lora_dropout", dropout)):
        if _hooked(module) or _replaced(module):
            return f"its {role} has hooks, or a forward of its own"
    if not isinstance(scaling, (int, float)) or not isfinite(scaling):
        return f"its scaling is {scaling}, not a finite number"
    if layer.__dict__[BACKEND] != "auto":
        return None
    return _objection_to_auto(base.weight.device.type, {base.weight.dtype, lora_A.weight.dtype, lora_B.weight.dtype})


def _objection_to_auto(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reference is no faster than PEFT: it serves those who ask for it by name."""
    try:
        chosen = choose("lora_linear", "auto", device, dtypes)
    except ValueError as error:
        return str(error)
    if chosen.backend != "reference":
        return None
    return f"no accelerated backend serves {', '.join(sorted(map(str, dtypes)))} on {device}"


def _fits(layer: Linear, x: Tensor) -> bool:
    """Whether the base layer takes this input as it is; what it refuses, PEFT shall refuse."""
    if type(x) not in (Tensor, nn.Parameter) or x.is_nested:
        return False
    if x.dtype is not cast(nn.Linear, layer.base_layer).weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return False
    return layer.cast_input_dtype_enabled or x.dtype is _adapter(layer, _active(layer)[0]).lora_A.weight.dtype


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _replaced(module: nn.Module) -> bool:
    """Whether this instance has another forward than its class, as `accelerate`'s hooks give it."""
    return "forward" in module.__dict__
