"""`lora_linear` and `lora_linear_group`: the documented functions, their checks and their choice of implementation."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import Contract, check_tensor, show
from kdkernels.ops.lora_linear import method as methods
from kdkernels.ops.lora_linear import reference, schema
from kdkernels.philox import draw_states

OP = "lora_linear"
GROUP = "lora_linear_group"
FLOAT32_MAX = 3.4028234663852886e38
CONTRACT = Contract(input="... d_in", weight="d_out d_in", lora_A="r d_in", lora_B="d_out r", bias="d_out?")


class LoRA(NamedTuple):
    """One layer of a group: the arguments of `lora_linear` but the input."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0


def lora_linear(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with a low-rank adapter: x Wᵀ + b + α (x̂ Aᵀ) Bᵀ (arXiv 2106.09685).

    x̂ = mask ⊙ x / (1 − p) is the input after dropout, which acts on the adapter alone, as in PEFT; the base layer sees
    x. The mask is a function of a seed and an offset, drawn once a call from torch's generator, and of the element's
    place: the same bits on every backend and for every number of threads, again under the same `torch.manual_seed`
    in a recomputed checkpoint, and different on every rank of a process group. It is not stored. Compiled
    code has eager code's masks, unless it draws other random numbers too: inductor takes those from its own generator.

    Args:
        input: (..., d_in).
        weight: (d_out, d_in), as in `torch.nn.Linear`, in the input's dtype; frozen or trained.
        lora_A: (r, d_in), any floating-point dtype: float32 adapters beside a bfloat16 base are read as they are.
        lora_B: (d_out, r).
        bias: (d_out,), in the input's dtype.
        scaling: α, finite: lora_alpha / r, or lora_alpha / √r for rsLoRA (arXiv 2312.03732).
        dropout_p: p, at least 0 and below 1. While evaluating, pass 0.
        backend: `"auto"`, `"reference"`, `"native"` (CPU) or `"triton"` (GPU). One that was asked for by name and
            cannot serve raises.

    Returns:
        (..., d_out), in the input's dtype; sums run in float32 (float64 for float64) and are rounded once.

    Only the gradients that are needed are computed. For backward the call keeps the input and S = x̂ Aᵀ (N, r), nothing
    else of an activation's size. The accelerated backends are differentiable once, the reference any way.

    Raises:
        TypeError: an argument is no floating-point tensor, or weight or bias has not the input's dtype.
        ValueError: shapes, devices or options do not fit; the message names the argument.
    """
    layer = LoRA(weight, lora_A, lora_B, bias, scaling, dropout_p)
    return _run(_prepare(input, [layer], backend, ("",)))[0]


def lora_linear_group(input: Tensor, layers: Sequence[LoRA], *, backend: str = "auto") -> tuple[Tensor, ...]:
    """`lora_linear` of several layers that share their input, such as q, k and v, or gate and up.

    The input is read once for all adapters and its gradient is formed at once. Layers that share one frozen `weight`
    (and bias), such as several students on one base, share its product too. Each layer draws a mask of its own.

    Args:
        input: (..., d_in).
        layers: `LoRA(weight, lora_A, lora_B, bias, scaling, dropout_p)`, each as in `lora_linear`; d_out and r may
            differ.
        backend: as in `lora_linear`.

    Returns:
        One (..., d_out) for each layer. A layer whose output is not used has no gradient (in compiled code, zeros).

    Raises:
        TypeError: as in `lora_linear`, or a layer is no `LoRA`; the message says which layer.
        ValueError: likewise, or there are no layers.
    """
    return _run(_prepare_group(input, layers, backend))


@dataclass(frozen=True)
class _Call:
    """A checked call."""

    input: Tensor  # (N, d_in)
    layers: Sequence[LoRA]
    leading: tuple[int, ...]
    backend: backends.Implementation


def _prepare_group(input: Tensor, layers: Sequence[LoRA], backend: str) -> _Call:
    if isinstance(layers, LoRA) or not isinstance(layers, (list, tuple)):
        raise TypeError(f"layers is {type(layers).__name__}, but must be a list of LoRA")
    for k, layer in enumerate(layers):
        if not (isinstance(layer, tuple) and 3 <= len(layer) <= len(LoRA._fields)):
            raise TypeError(f"layers[{k}] is {type(layer).__name__}, but must be a LoRA")
    layers = [LoRA(*layer) for layer in layers]
    if not layers:
        raise ValueError("layers is empty, but must have at least one layer")
    return _prepare(input, layers, backend, tuple(f"layers[{k}]." for k in range(len(layers))))


def _prepare(input: Tensor, layers: Sequence[LoRA], backend: str, prefixes: Sequence[str]) -> _Call:
    check_tensor("input", input)
    for layer, prefix in zip(layers, prefixes, strict=True):
        _check(input, layer, prefix)
    layers = [a._replace(scaling=float(a.scaling), dropout_p=float(a.dropout_p)) for a in layers]
    input, layers = _autocast(input, layers)
    for layer, prefix in zip(layers, prefixes, strict=True):
        for name in ("weight", "bias"):
            value = getattr(layer, name)
            if value is not None and value.dtype is not input.dtype:
                raise TypeError(f"{prefix}{name} has dtype {value.dtype}, but must have the input's, {input.dtype}")
    tensors = [input, *(x for layer in layers for x in layer[:4] if x is not None)]
    chosen = backends.choose(OP, backend, input.device.type, {x.dtype for x in tensors})
    if chosen.backend != "reference":
        backends.refuse_tangents(OP, tensors)
    leading = input.shape[:-1]
    return _Call(input.reshape(prod(leading), input.shape[-1]), layers, leading, chosen)


def _check(input: Tensor, layer: LoRA, prefix: str) -> None:
    tensors = {"input": input} | {f"{name}": getattr(layer, name) for name in ("weight", "lora_A", "lora_B", "bias")}
    try:
        CONTRACT.bind(tensors)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{prefix}{error}" if prefix else str(error)) from None
    for name in ("scaling", "dropout_p"):
        value = getattr(layer, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{prefix}{name} is {type(value).__name__}, but must be a number")
    if layer.lora_A.shape[0] < 1:
        raise ValueError(
            f"{prefix}lora_A has shape {show(tuple(layer.lora_A.shape))}, but must have a rank of at least 1"
        )
    if not abs(layer.scaling) <= FLOAT32_MAX:  # math.isfinite would break a compiled graph
        raise ValueError(f"{prefix}scaling is {layer.scaling}, but must be finite")
    if not 0 <= layer.dropout_p < 1:
        raise ValueError(f"{prefix}dropout_p is {layer.dropout_p}, but must be at least 0 and below 1")


def _autocast(input: Tensor, layers: Sequence[LoRA]) -> tuple[Tensor, Sequence[LoRA]]:
    """Under autocast the base layer is cast as `torch.nn.functional.linear` would cast it; adapters stay precise."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or input.dtype is torch.float64:
        return input, layers
    dtype = torch.get_autocast_dtype(device)
    cast = [
        layer._replace(weight=layer.weight.to(dtype), bias=None if layer.bias is None else layer.bias.to(dtype))
        for layer in layers
    ]
    return input.to(dtype), cast


def _run(call: _Call) -> tuple[Tensor, ...]:
    x, layers = call.input, call.layers
    drops = any(layer.dropout_p > 0 for layer in layers)
    states = draw_states(len(layers), x.device) if drops else torch.empty(0, 2, dtype=torch.int64, device=x.device)
    outputs: Sequence[Tensor]
    if call.backend.backend == "reference":
        outputs = [
            reference.adapted(
                x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, layer.dropout_p,
                states[k] if drops else None,
            )
            for k, layer in enumerate(layers)
        ]  # fmt: skip
    else:
        outputs = schema.call(
            x,
            [layer.weight for layer in layers],
            [x.new_empty(0) if layer.bias is None else layer.bias for layer in layers],
            [layer.lora_A for layer in layers],
            [layer.lora_B for layer in layers],
            [layer.scaling for layer in layers],
            [layer.dropout_p for layer in layers],
            states,
            call.backend.backend,
        )
    return tuple(y.reshape(*call.leading, y.shape[-1]) for y in outputs)


def _explain(
    input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, backend: str, **options: Any
) -> backends.Explanation:
    return _explain_call(OP, input, _prepare(input, [LoRA(weight, lora_A, lora_B, **options)], backend, ("",)))


def _explain_group(input: Tensor, layers: Sequence[LoRA], backend: str) -> backends.Explanation:
    return _explain_call(GROUP, input, _prepare_group(input, layers, backend))


def _explain_call(op: str, input: Tensor, call: _Call) -> backends.Explanation:
    """The costs are those of all layers, each by itself: what they share is saved on top."""
    grad = torch.is_grad_enabled()
    each = []
    for layer in call.layers:
        needs = {name: grad and getattr(layer, name).requires_grad for name in ("weight", "lora_A", "lora_B")}
        each.append(methods.costs(call.input, layer, needs | {"input": grad and input.requires_grad}))
    costs = tuple(
        backends.Cost(same[0].method, sum(c.flops for c in same), sum(c.bytes for c in same))
        for same in zip(*each, strict=True)
    )
    dtypes = {x.dtype for layer in call.layers for x in (call.input, *layer[:4]) if x is not None}
    reasons = backends.passed_over(OP, call.backend, input.device.type, dtypes)
    method = "eager" if call.backend.backend == "reference" else "fused"
    return backends.Explanation(op, call.backend.backend, method, reasons, costs)


backends.register_explainer(lora_linear, _explain)
backends.register_explainer(lora_linear_group, _explain_group)
