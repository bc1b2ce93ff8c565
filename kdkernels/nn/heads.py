"""The `Head` of a module: what a fused loss must know of a layer that it computes in the layer's place."""

import sys
from math import isfinite
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from kdkernels.nn.lora_linear import LoRALinear
from kdkernels.ops.linear_distillation import Head
from kdkernels.ops.linear_distillation.head import check_numbers

SERVED = "a torch.nn.Linear, a kdkernels.nn.LoRALinear or PEFT's lora.Linear"


def head_of(module: nn.Module, softcap: float | None = None, scale: float = 1.0) -> Head:
    """The head that computes what `module` does, adapter included, for `kdkernels.linear_distillation_loss`.

    The tensors are the module's own: gradients reach its parameters, those that it shares with an embedding too. What
    it says holds as long as the module is as it is: ask again after `train()`, `merge()` or a switch of adapters.

    Args:
        module: one of these, V outputs of d inputs:

            - `torch.nn.Linear`;
            - `kdkernels.nn.LoRALinear`: its adapter, with dropout while it trains; while merged, the merged weight;
            - PEFT's `lora.Linear`: its one active adapter, with dropout while it trains; only the base layer where no
              adapter is active, they are disabled, or they are merged into it, as in its forward;
            - PEFT's `ModulesToSaveWrapper` of one of these: the copy that is active.
        softcap: of the logits, which the model applies after the module; as in `Head`.
        scale: of the logits, likewise.

    Raises:
        TypeError: module is of another kind, its weight is no plain tensor (quantised, or computed by a
            parametrization), or softcap or scale is no number.
        ValueError: the module does what a `Head` cannot say: several active adapters, DoRA and other variants, a bias
            of the adapter, `fan_in_fan_out`, hooks, a forward of its own. The message says which. Or softcap or scale
            does not fit.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {type(module).__name__}, but must be {SERVED}")
    found = _of(module)._replace(softcap=softcap, scale=scale)
    check_numbers("head", found)
    return found


def _of(module: nn.Module) -> Head:
    _check_untouched("module", module)
    if _runs(module, nn.Linear):
        return _plain("module", module)
    if _runs(module, LoRALinear):
        return _of_lora_linear(cast(LoRALinear, module))
    if _is_peft(module, "peft.tuners.lora.layer", "Linear"):
        return _of_peft(module)
    if _is_peft(module, "peft.utils.other", "ModulesToSaveWrapper"):
        return _of(_saved(module))
    kind = type(module)
    raise TypeError(f"module is a {kind.__module__}.{kind.__qualname__}, but must be {SERVED}")


def _plain(name: str, linear: Any) -> Head:
    if not _runs(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, but must be a torch.nn.Linear")
    _check_untouched(name, linear)
    for field in ("weight", "bias"):
        value = getattr(linear, field)
        if value is not None and type(value) not in (Tensor, nn.Parameter):
            raise TypeError(f"{name}.{field} is a {type(value).__name__}, but must be a plain tensor")
    if hasattr(linear, "parametrizations"):
        raise TypeError(f"{name} has parametrizations ({', '.join(linear.parametrizations)}), but must hold its weight")
    return Head(linear.weight, linear.bias)


def _of_lora_linear(layer: LoRALinear) -> Head:
    if layer.merged:
        return Head(layer.weight, layer.bias)
    dropout_p = layer.dropout if layer.training else 0.0
    return Head(layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, dropout_p)


def _of_peft(layer: Any) -> Head:
    if layer.disable_adapters and layer.merged:
        raise ValueError("module has disabled adapters that are merged into its base layer: call its unmerge() first")
    base = _plain("module.base_layer", layer.base_layer)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active:
        return base
    if len(active) > 1:
        raise ValueError(f"module has {len(active)} active adapters ({', '.join(active)}), but a Head has one")
    name = active[0]
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__
        raise ValueError(f"module's adapter {name!r} is a variant of LoRA, {variant}, but a Head has plain LoRA")
    if layer.fan_in_fan_out:
        raise ValueError("module has fan_in_fan_out set, but a Head's weight is (V, d)")
    lora_A = _plain(f"module.lora_A.{name}", layer.lora_A[name])
    lora_B = _plain(f"module.lora_B.{name}", layer.lora_B[name])
    if lora_A.bias is not None or lora_B.bias is not None:
        raise ValueError(f"module's adapter {name!r} has a bias, but that of a Head has none")
    scaling = layer.scaling[name]
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not isfinite(scaling):
        raise ValueError(f"module's adapter {name!r} has a scaling of {scaling}, but it must be a finite number")
    dropout_p = _dropout(f"module.lora_dropout.{name}", layer.lora_dropout[name])
    return Head(base.weight, base.bias, lora_A.weight, lora_B.weight, float(scaling), dropout_p)


def _dropout(name: str, dropout: nn.Module) -> float:
    """The probability at which it drops now."""
    _check_untouched(name, dropout)
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or dropout.inplace:
        raise ValueError(f"{name} is {dropout}, but must be a torch.nn.Dropout that is not in place")
    return dropout.p if dropout.training else 0.0


def _saved(wrapper: Any) -> nn.Module:
    """The copy that PEFT's wrapper calls, or the original."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or active[0] not in wrapper.modules_to_save:
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it computes what `kind` does: subclasses may, if their forward is that of `kind`."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _is_peft(module: nn.Module, home: str, name: str) -> bool:
    """Whether it is exactly PEFT's class, or ours of it; who has such a layer has imported PEFT."""
    kind = getattr(sys.modules.get(home), name, None)
    accelerated = getattr(sys.modules.get("kdkernels.integrations.peft"), "AcceleratedLinear", None)
    return kind is not None and type(module) in (kind, accelerated) and isinstance(module, kind)


def _check_untouched(name: str, module: nn.Module) -> None:
    """Hooks, and a forward of the instance's own, would not run."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if any(hooks) or _has_any_global_hook():
        raise ValueError(f"{name} has hooks, but a Head runs none: remove them first")
    if "forward" in module.__dict__:
        raise ValueError(f"{name} has a forward of its own, but a Head computes that of {type(module).__name__}")
