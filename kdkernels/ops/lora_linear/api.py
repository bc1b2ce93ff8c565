"""`lora_linear` and `lora_linear_group`: the documented functions, their checks and their choice of implementation."""

from collections.abc import Callable, Sequence
from math import prod
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import Contract, autocast_dtype, check_tensor, show
from kdkernels.ops.lora_linear import method as methods
from kdkernels.ops.lora_linear import reference, schema
from kdkernels.ops.lora_linear.call import LoRA, pack
from kdkernels.philox import draw_states
from kdkernels.plans import Plans

OP = "lora_linear"
GROUP = "lora_linear_group"
FLOAT32_MAX = 3.4028234663852886e38
CONTRACT = Contract(input="... d_in", weight="d_out d_in", lora_A="r d_in", lora_B="d_out r", bias="d_out?")
PLANS = Plans()
ALONE = ("",)  # what errors put before the names of a layer's arguments


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
    return _run(input, [LoRA(weight, lora_A, lora_B, bias, scaling, dropout_p)], backend, ALONE)[0]


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
    layers, prefixes = _as_layers(layers)
    return tuple(_run(input, layers, backend, prefixes))


def _as_layers(layers: Any) -> tuple[list[LoRA], tuple[str, ...]]:
    """The layers of a group, and what errors call them."""
    if isinstance(layers, LoRA) or not isinstance(layers, (list, tuple)):
        raise TypeError(f"layers is {type(layers).__name__}, but must be a list of LoRA")
    for k, layer in enumerate(layers):
        if not (isinstance(layer, tuple) and 3 <= len(layer) <= len(LoRA._fields)):
            raise TypeError(f"layers[{k}] is {type(layer).__name__}, but must be a LoRA")
    if not layers:
        raise ValueError("layers is empty, but must have at least one layer")
    return [LoRA(*layer) for layer in layers], tuple(f"layers[{k}]." for k in range(len(layers)))


class _Plan(NamedTuple):
    """What is decided of a call."""

    backend: backends.Implementation
    run: Callable[..., Sequence[Tensor]]  # of the operator, in the way that such tensors need
    cast: torch.dtype | None  # what autocast makes of the base layers
    leading: tuple[int, ...] | None  # of the input, unless it has one leading dimension
    drops: bool


def _run(input: Tensor, layers: Sequence[LoRA], backend: str, prefixes: Sequence[str]) -> Sequence[Tensor]:
    tensors, numbers = pack(input, layers)
    plan = _choose(input, layers, backend, prefixes, tensors, numbers)
    if plan.cast is not None:
        input, layers = input.to(plan.cast), _cast(layers, plan.cast)
        tensors, _ = pack(input, layers)
    if plan.leading is not None:
        tensors[0] = input.reshape(prod(plan.leading), input.shape[-1])
    states = draw_states(len(layers), input.device) if plan.drops else None
    outputs: Sequence[Tensor]
    if plan.backend.backend == "reference":
        outputs = _by_reference(tensors[0], layers, states)  # type: ignore[arg-type]
    else:
        outputs = plan.run(tensors, [float(x) for x in numbers], states, plan.backend.backend)
    return outputs if plan.leading is None else tuple(y.reshape(*plan.leading, y.shape[-1]) for y in outputs)


def _by_reference(x: Tensor, layers: Sequence[LoRA], states: Tensor | None) -> list[Tensor]:
    return [
        reference.adapted(
            x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, float(layer.scaling), float(layer.dropout_p),
            None if states is None else states[k],
        )
        for k, layer in enumerate(layers)
    ]  # fmt: skip


def _choose(
    input: Tensor, layers: Sequence[LoRA], backend: str, prefixes: Sequence[str], tensors: Any, numbers: Any
) -> _Plan:
    """The plan of the checked call."""
    cast = autocast_dtype(input)
    if cast is not None and input.dtype is torch.float64:
        cast = None  # as torch leaves it

    def decide() -> _Plan:
        check_tensor("input", input)
        for layer, prefix in zip(layers, prefixes, strict=True):
            _check(input, layer, prefix)
        dtypes = {cast or input.dtype}
        for layer, prefix in zip(layers, prefixes, strict=True):
            for name in ("weight", "bias"):
                value = getattr(layer, name)
                if value is not None and cast is None and value.dtype is not input.dtype:
                    raise TypeError(f"{prefix}{name} has dtype {value.dtype}, but must have the input's, {input.dtype}")
            dtypes |= {layer.lora_A.dtype, layer.lora_B.dtype}
        chosen = backends.choose(OP, backend, input.device.type, dtypes)
        if chosen.backend != "reference":
            backends.refuse_tangents(OP, [x for x in tensors if x is not None])
        leading = None if input.dim() == 2 else input.shape[:-1]
        return _Plan(chosen, schema.lora_linear.route(tensors), cast, leading, any(numbers[1::2]))

    options = (*numbers, backend, backends.default(), cast, torch.is_grad_enabled())
    return PLANS.find(tensors, options, decide)


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


def _cast(layers: Sequence[LoRA], dtype: torch.dtype) -> Sequence[LoRA]:
    """The base layers in this dtype; adapters stay precise."""
    return [
        layer._replace(weight=layer.weight.to(dtype), bias=None if layer.bias is None else layer.bias.to(dtype))
        for layer in layers
    ]


def _explain(
    input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, backend: str, **options: Any
) -> backends.Explanation:
    return _explain_call(OP, input, [LoRA(weight, lora_A, lora_B, **options)], backend, ALONE)


def _explain_group(input: Tensor, layers: Sequence[LoRA], backend: str) -> backends.Explanation:
    layers, prefixes = _as_layers(layers)
    return _explain_call(GROUP, input, layers, backend, prefixes)


def _explain_call(
    op: str, input: Tensor, layers: Sequence[LoRA], backend: str, prefixes: Sequence[str]
) -> backends.Explanation:
    """The costs are those of all layers, each by itself: what they share is saved on top."""
    plan = _choose(input, layers, backend, prefixes, *pack(input, layers))
    grad = torch.is_grad_enabled()
    wanted = {"input": grad and input.requires_grad}
    if plan.cast is not None:
        input, layers = input.to(plan.cast), _cast(layers, plan.cast)
    x = input.reshape(prod(input.shape[:-1]), input.shape[-1])
    each = []
    for layer in layers:
        needs = {name: grad and getattr(layer, name).requires_grad for name in ("weight", "lora_A", "lora_B")}
        each.append(methods.costs(x, layer, needs | wanted))
    costs = tuple(
        backends.Cost(same[0].method, sum(c.flops for c in same), sum(c.bytes for c in same))
        for same in zip(*each, strict=True)
    )
    dtypes = {x.dtype for layer in layers for x in (input, *layer[:4]) if x is not None}
    reasons = backends.passed_over(OP, plan.backend, input.device.type, dtypes)
    method = "eager" if plan.backend.backend == "reference" else "fused"
    return backends.Explanation(op, plan.backend.backend, method, reasons, costs)


backends.register_explainer(lora_linear, _explain)
backends.register_explainer(lora_linear_group, _explain_group)
