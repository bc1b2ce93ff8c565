"""Seeded inputs for layers with adapters, and the three ways to run them with the same masks.

`exact` is the reference in float64, `eager` the steps of PEFT in the dtypes of the inputs, `ours` the operator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops.lora_linear import LoRA, reference, schema
from kdkernels.ops.lora_linear.call import pack
from kdkernels.testing.compare import Outcome, incoming

NAMES = ("weight", "lora_A", "lora_B", "bias")  # of a layer's tensors, in LoRA's order


@dataclass(frozen=True)
class Inputs:
    """One call: layers that share an input, the states of their masks, and which gradients are wanted."""

    input: Tensor  # (N, d_in)
    layers: tuple[LoRA, ...]
    states: Tensor  # (K, 2)
    needs: frozenset[str]  # of "input" and NAMES

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype; layers that share a tensor still do."""
        moved: dict[int, Tensor] = {}

        def move(x: Any) -> Any:
            return moved.setdefault(id(x), x.detach().to(dtype)) if isinstance(x, Tensor) else x

        layers = tuple(LoRA(*map(move, layer)) for layer in self.layers)
        return replace(self, input=self.input.detach().to(dtype), layers=layers)


def make_inputs(
    N: int = 37,
    d_in: int = 29,
    d_out: int = 22,
    r: int = 5,
    *,
    K: int = 1,
    shared: bool = False,
    bias: bool = True,
    dropout_p: float = 0.0,
    scaling: float = 1.7,
    needs: Sequence[str] = ("input", *NAMES),
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """K layers, of which the k-th has rank r + k. `shared`: one weight and bias for all; `strided`: x is transposed."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device, to)

    x = normal(d_in, N).T if strided else normal(N, d_in)
    narrow = adapter_dtype or dtype
    layers: list[LoRA] = []
    for k in range(K):
        rank = r + k
        weight, b = normal(d_out, d_in) / d_in**0.5, normal(d_out) if bias else None
        A, B = normal(rank, d_in, to=narrow) / d_in**0.5, normal(d_out, rank, to=narrow) / rank**0.5
        if shared and layers:
            weight, b = layers[0].weight, layers[0].bias
        layers.append(LoRA(weight, A, B, b, scaling - 0.4 * k, dropout_p))
    states = torch.randint(-(2**63), 2**63 - 1, (K, 2), generator=draw).to(device)
    return Inputs(x, tuple(layers), states, frozenset(needs))


Function = Callable[[Tensor, tuple[LoRA, ...]], Sequence[Tensor]]


class Step:
    """Forward and backward on one set of leaves; what arrives from behind is made beforehand."""

    def __init__(self, inputs: Inputs) -> None:
        self.input = inputs.input.detach().requires_grad_("input" in inputs.needs)
        self.wanted = {"input": self.input} if self.input.requires_grad else {}
        leaves: dict[int, Tensor] = {}
        layers = []
        for k, layer in enumerate(inputs.layers):
            for name in NAMES:
                tensor = getattr(layer, name)
                if tensor is not None and id(tensor) not in leaves:
                    leaves[id(tensor)] = tensor.detach().requires_grad_(name in inputs.needs)
                    if name in inputs.needs:
                        self.wanted[f"{name} {k}"] = leaves[id(tensor)]
            layers.append(LoRA(*(leaves.get(id(value), value) for value in layer)))  # type: ignore[arg-type]
        self.layers = tuple(layers)
        shapes = [(len(self.input), layer.weight.shape[0]) for layer in layers]
        self.incoming = [incoming(self.input.new_empty(shape)) for shape in shapes]

    def __call__(self, function: Function) -> Outcome:
        """All outputs, and the wanted gradients of them times `incoming`."""
        outputs = function(self.input, self.layers)
        grads = torch.autograd.grad(outputs, list(self.wanted.values()), self.incoming) if self.wanted else ()
        first, *others = (y.detach() for y in outputs)
        named = {f"output {k}": y for k, y in enumerate(others, 1)}
        return Outcome(first, dict(zip(self.wanted, grads, strict=True)), "output", named)


def run(inputs: Inputs, function: Function) -> Outcome:
    """One step on fresh leaves."""
    return Step(inputs)(function)


def exact(inputs: Inputs) -> Outcome:
    """The reference in float64."""
    return through_reference(inputs.to(torch.float64))


def through_reference(inputs: Inputs) -> Outcome:
    """The reference in the inputs' dtypes."""

    def adapted(x: Tensor, layers: tuple[LoRA, ...]) -> list[Tensor]:
        return [
            reference.adapted(x, a.weight, a.bias, a.lora_A, a.lora_B, a.scaling, a.dropout_p, state)
            for a, state in zip(layers, inputs.states, strict=True)
        ]

    return run(inputs, adapted)


def eager(inputs: Inputs) -> Outcome:
    """PEFT's steps, with the operator's masks."""

    def steps(x: Tensor, layers: tuple[LoRA, ...]) -> list[Tensor]:
        return [
            reference.eager(
                x,
                reference.dropped(x.to(a.lora_A.dtype), state, a.dropout_p),
                *(a.weight, a.bias, a.lora_A, a.lora_B, a.scaling),
            )
            for a, state in zip(layers, inputs.states, strict=True)
        ]

    return run(inputs, steps)


def ours(inputs: Inputs, backend: str) -> Outcome:
    """The operator below dispatch, which does not draw the states and does not know Triton's interpreter."""
    if backend == "reference":
        return through_reference(inputs)

    def call(x: Tensor, layers: tuple[LoRA, ...]) -> list[Tensor]:
        states = inputs.states if any(layer.dropout_p for layer in layers) else None
        return schema.lora_linear(*pack(x, layers), states, backend)

    return run(inputs, call)
